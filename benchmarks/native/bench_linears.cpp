// Speed of the kernel of linears at OLMoE-like shapes (64 experts, 8 a row, 1,024 features to 512)
// and at one of Llama 3.2 1B's (2,048 features to 8,192). Decode is memory: bytes of the chosen
// experts a second; prefill is products a second. On one thread in its processor time, so that what
// else runs counts less, or on as many as are asked for in seconds.
// usage: bench_linears [THREADS]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

#include "doubleweave/linears.h"
#include "doubleweave/threads.h"

namespace dw = doubleweave;

namespace {

struct Shape {
  const char* name;
  int64_t num_experts, num_choices, in_features, out_features;
};

constexpr Shape kShapes[] = {{"experts", 64, 8, 1024, 512}, {"linear", 1, 1, 2048, 8192}};

struct Form {
  const char* name;
  dw::LinearFormat format;
  bool has_offsets;
  double bytes;  // of a weight
};

constexpr Form kForms[] = {{"float32", dw::LinearFormat::kFloat32, false, 4},
                           {"int8", dw::LinearFormat::kInt8, false, 1 + 2.0 / 64},
                           {"int4", dw::LinearFormat::kInt4, false, 18.0 / 32},
                           {"int4 with offsets", dw::LinearFormat::kInt4, true, 19.0 / 32}};

struct Layer {
  std::vector<uint8_t> weights;
  std::vector<float> scales;
  std::vector<uint16_t> group_scales;
  std::vector<int8_t> offsets;
  dw::LinearWeights view{};
};

Layer make_layer(const Form& form, const Shape& shape) {
  static std::mt19937 random(1);
  Layer layer;
  const auto features = static_cast<size_t>(shape.num_experts * shape.out_features);
  const size_t weights = features * static_cast<size_t>(shape.in_features);
  const size_t bits = form.format == dw::LinearFormat::kFloat32 ? 32
                      : form.format == dw::LinearFormat::kInt8  ? 8
                                                                : 4;
  layer.weights.resize(weights * bits / 8);
  for (size_t i = 0; i + 4 <= layer.weights.size(); i += 4) {
    const float value = 1.0f;
    const uint32_t number = random();
    std::memcpy(&layer.weights[i], bits == 32 ? static_cast<const void*>(&value) : &number, 4);
  }
  layer.scales.assign(features, 0.01f);
  layer.group_scales.assign(weights / dw::kLinearGroup, 0x3c24);
  layer.offsets.assign(weights / dw::kLinearGroup, 77);
  layer.view.format = form.format;
  layer.view.num_experts = shape.num_experts;
  layer.view.in_features = shape.in_features;
  layer.view.out_features = shape.out_features;
  return layer;
}

double now(bool is_alone) {
  if (is_alone) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of one pass over all layers (so that no weight is in a cache when it is needed again).
double measure(std::vector<Layer>& layers, const Form& form, const Shape& shape, int64_t num_rows,
               bool is_alone) {
  std::mt19937 random(2);
  std::vector<float> x(static_cast<size_t>(num_rows * shape.in_features), 0.5f);
  for (float& value : x) value = static_cast<float>(random() % 1000) / 500 - 1;
  std::vector<int64_t> all(static_cast<size_t>(shape.num_experts));
  for (size_t e = 0; e < all.size(); ++e) all[e] = static_cast<int64_t>(e);
  std::vector<int64_t> index;
  for (int64_t row = 0; row < num_rows; ++row) {
    std::shuffle(all.begin(), all.end(), random);
    index.insert(index.end(), all.begin(), all.begin() + shape.num_choices);
  }
  std::vector<float> out(static_cast<size_t>(num_rows * shape.num_choices * shape.out_features));
  std::vector<double> samples;
  for (int round = 0; round < 9; ++round) {
    const double start = now(is_alone);
    for (Layer& layer : layers) {
      layer.view.weights = layer.weights.data();
      layer.view.scales = layer.group_scales.data();
      if (form.has_offsets) {
        layer.view.offsets = layer.offsets.data();
        layer.view.offset_scales = layer.scales.data();
      }
      dw::expert_linear(layer.view, {num_rows, shape.num_choices, false, x.data(), index.data()},
                        out.data());
    }
    samples.push_back(now(is_alone) - start);
  }
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 4];
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  dw::set_intra_op_threads(threads);
  for (const Shape& shape : kShapes) {
    for (const Form& form : kForms) {
      std::vector<Layer> layers;
      for (int i = 0; i < 12; ++i) layers.push_back(make_layer(form, shape));
      const auto weights = static_cast<double>(shape.in_features * shape.out_features);
      for (const int64_t rows : {1, 16, 128, 512}) {
        const double seconds =
            measure(layers, form, shape, rows, threads == 1) / static_cast<double>(layers.size());
        const int64_t chosen = rows * shape.num_choices;
        const double used = static_cast<double>(std::min(chosen, shape.num_experts)) * weights;
        std::printf("%-7s %-17s %4d rows: %8.1f us, %7.1f GOP/s, %6.1f GB/s\n", shape.name,
                    form.name, static_cast<int>(rows), seconds * 1e6,
                    2 * static_cast<double>(chosen) * weights / seconds / 1e9,
                    used * form.bytes / seconds / 1e9);
      }
    }
  }
  return 0;
}

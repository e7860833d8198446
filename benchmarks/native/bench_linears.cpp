// Speed of the experts' kernel at OLMoE-like shapes: 64 experts, 8 a row, 1,024 features to 512 and
// back. Decode is memory: bytes of the chosen experts a second; prefill is products a second.
// On one thread, in its processor time, so that what else runs counts less.
// usage: bench_linears
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

#include "doubleweave/linears.h"
#include "doubleweave/threads.h"

namespace dw = doubleweave;

namespace {

constexpr int64_t kExperts = 64;
constexpr int64_t kChoices = 8;

struct Layer {
  std::vector<uint8_t> weights;
  std::vector<float> scales;
  std::vector<uint16_t> group_scales;
  std::vector<float> sums;
  dw::LinearWeights view{};
};

Layer make_layer(dw::LinearFormat format, int64_t in_features, int64_t out_features) {
  static std::mt19937 random(1);
  Layer layer;
  const auto weights = static_cast<size_t>(kExperts * in_features * out_features);
  const size_t bits = format == dw::LinearFormat::kFloat32 ? 32
                      : format == dw::LinearFormat::kInt8  ? 8
                                                           : 4;
  layer.weights.resize(weights * bits / 8);
  for (size_t i = 0; i + 4 <= layer.weights.size(); i += 4) {
    const float value = 1.0f;
    const uint32_t number = random();
    std::memcpy(&layer.weights[i], bits == 32 ? static_cast<const void*>(&value) : &number, 4);
  }
  layer.scales.assign(static_cast<size_t>(kExperts * out_features), 0.01f);
  layer.group_scales.assign(weights / dw::kLinearGroup, 0x3c24);
  layer.sums.assign(static_cast<size_t>(kExperts * out_features), 0.1f);
  layer.view.format = format;
  layer.view.num_experts = kExperts;
  layer.view.in_features = in_features;
  layer.view.out_features = out_features;
  return layer;
}

// Seconds of one pass over all layers (so that no weight is in a cache when it is needed again).
double measure(std::vector<Layer>& layers, int64_t num_rows) {
  std::mt19937 random(2);
  const int64_t in_features = layers[0].view.in_features;
  const int64_t out_features = layers[0].view.out_features;
  std::vector<float> x(static_cast<size_t>(num_rows * in_features), 0.5f);
  for (float& value : x) value = static_cast<float>(random() % 1000) / 500 - 1;
  std::vector<int64_t> all(kExperts);
  for (int64_t e = 0; e < kExperts; ++e) all[static_cast<size_t>(e)] = e;
  std::vector<int64_t> index;
  for (int64_t row = 0; row < num_rows; ++row) {
    std::shuffle(all.begin(), all.end(), random);
    index.insert(index.end(), all.begin(), all.begin() + kChoices);
  }
  std::vector<float> out(static_cast<size_t>(num_rows * kChoices * out_features));
  std::vector<double> samples;
  for (int round = 0; round < 7; ++round) {
    const std::clock_t start = std::clock();
    for (Layer& layer : layers) {
      layer.view.weights = layer.weights.data();
      layer.view.scales = layer.view.format == dw::LinearFormat::kInt4
                              ? static_cast<const void*>(layer.group_scales.data())
                              : layer.scales.data();
      layer.view.sums = layer.sums.data();
      dw::expert_linear(layer.view, {num_rows, kChoices, false, x.data(), index.data()},
                        out.data());
    }
    samples.push_back(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
  }
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 4];
}

}  // namespace

int main() {
  dw::set_intra_op_threads(1);
  const struct {
    const char* name;
    dw::LinearFormat format;
    double bytes;  // of a weight
  } formats[] = {{"float32", dw::LinearFormat::kFloat32, 4},
                 {"int8", dw::LinearFormat::kInt8, 1},
                 {"int4", dw::LinearFormat::kInt4, 0.5625}};
  for (const auto& [name, format, bytes] : formats) {
    std::vector<Layer> layers;
    for (int i = 0; i < 12; ++i) layers.push_back(make_layer(format, 1024, 512));
    for (const int64_t rows : {1, 16, 128, 512}) {
      const double seconds = measure(layers, rows) / static_cast<double>(layers.size());
      const double products = static_cast<double>(rows * kChoices) * 1024 * 512;
      const double used = static_cast<double>(std::min(rows * kChoices, kExperts)) * 1024 * 512;
      std::printf("%-8s %4d rows: %8.1f us, %7.1f GOP/s, %6.1f GB/s\n", name,
                  static_cast<int>(rows), seconds * 1e6, 2 * products / seconds / 1e9,
                  used * bytes / seconds / 1e9);
    }
  }
  return 0;
}

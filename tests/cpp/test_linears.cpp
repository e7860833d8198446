// Checks the experts' kernels, in every instruction set that this machine has, against the
// definition in float64, and the sum of a row's results.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "doubleweave/linears.h"
#include "src/linears_kernel.h"

namespace dw = doubleweave;
using dw::LinearFormat;

namespace {

constexpr float kGuard = 12345.5f;

struct Case {
  LinearFormat format;
  int64_t num_rows, num_choices, num_experts, in_features, out_features;
  bool has_own_rows, has_bias, has_offsets;
};

const char* format_name(LinearFormat format) {
  return format == LinearFormat::kFloat32 ? "float32"
         : format == LinearFormat::kInt8  ? "int8"
                                          : "int4";
}

std::string describe(const Case& c) {
  char text[160];
  std::snprintf(text, sizeof text, "%s T=%d C=%d E=%d K=%d N=%d %s %s %s", format_name(c.format),
                static_cast<int>(c.num_rows), static_cast<int>(c.num_choices),
                static_cast<int>(c.num_experts), static_cast<int>(c.in_features),
                static_cast<int>(c.out_features), c.has_own_rows ? "own rows" : "shared rows",
                c.has_bias ? "bias" : "", c.has_offsets ? "offsets" : "");
  return text;
}

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Weights as packed_linears.py packs them, and what they stand for.
struct Weights {
  std::vector<double> exact;  // [experts, out_features, in_features]
  std::vector<float> floats, bias;
  std::vector<uint8_t> bytes;
  std::vector<uint16_t> scales;
  std::vector<int8_t> offsets;
  std::vector<float> offset_scales;
  dw::LinearWeights view{};
};

// Where a block of some group lies among those of its expert, four of which lie together.
int64_t in_bundle(int64_t block, int64_t blocks, int64_t group, int64_t groups) {
  const int64_t first = block / 4 * 4;
  return first * groups + group * std::min<int64_t>(4, blocks - first) + block - first;
}

Weights make_weights(const Case& c, std::mt19937& random) {
  const bool is_int4 = c.format == LinearFormat::kInt4;
  const int64_t blocks = (c.out_features + 15) / 16;
  const int64_t size = is_int4 ? 32 : 64;  // of a group
  const int64_t groups = (c.in_features + size - 1) / size;
  const int64_t pairs = (c.in_features + 63) / 64;
  std::uniform_real_distribution<float> number(-1, 1);
  Weights w;
  w.exact.resize(c.num_experts * c.out_features * c.in_features);
  w.floats.resize(c.num_experts * blocks * c.in_features * 16);
  w.bytes.assign(c.num_experts * blocks * groups * size * (is_int4 ? 8 : 16), is_int4 ? 0x88 : 128);
  w.scales.resize(c.num_experts * blocks * groups * 16);
  w.offsets.resize(c.num_experts * blocks * pairs * 32);
  w.offset_scales.resize(c.num_experts * blocks * 16);
  for (int64_t e = 0; e < c.num_experts; ++e) {
    for (int64_t n = 0; n < c.out_features; ++n) {
      const int64_t block = e * blocks + n / 16;
      const int64_t lane = n % 16;
      const float offset_scale = c.has_offsets ? std::abs(number(random)) / 100 : 0.0f;
      w.offset_scales[block * 16 + lane] = offset_scale;
      float scale = 0;
      double offset = 0;
      for (int64_t k = 0; k < c.in_features; ++k) {
        double& exact = w.exact[(e * c.out_features + n) * c.in_features + k];
        if (c.format == LinearFormat::kFloat32) {
          const float value = number(random);
          w.floats[(block * c.in_features + k) * 16 + lane] = value;
          exact = value;
          continue;
        }
        const int64_t group = k / size;
        const int64_t at = e * blocks * groups + in_bundle(n / 16, blocks, group, groups);
        if (k % size == 0) {
          auto bits = static_cast<uint16_t>(0x3e00 + random() % 0x100);
          if (is_int4 && lane % 3 == 0) bits |= 0x8000;
          w.scales[at * 16 + lane] = bits;
          scale = from_bfloat16(bits);
          if (is_int4) {
            const auto steps = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
            const int64_t pair = e * blocks * pairs + in_bundle(n / 16, blocks, group / 2, pairs);
            w.offsets[(pair * 16 + lane) * 2 + group % 2] = steps;
            offset = static_cast<double>(steps) * offset_scale;
          }
        }
        if (!is_int4) {
          const int value = static_cast<int>(random() % 255) - 127;
          w.bytes[((at * 16 + k % 64 / 4) * 16 + lane) * 4 + k % 4] =
              static_cast<uint8_t>(value + 128);
          exact = static_cast<double>(value) * scale;
          continue;
        }
        const int value = static_cast<int>(random() % 16) - 8;
        uint8_t& byte = w.bytes[((at * 4 + k % 32 / 8) * 16 + lane) * 4 + k % 4];
        const auto half = static_cast<uint8_t>(value + 8);
        byte = k % 8 < 4 ? static_cast<uint8_t>((byte & 0xf0) | half)
                         : static_cast<uint8_t>((byte & 0x0f) | half << 4);
        exact = static_cast<double>(value) * scale + offset;
      }
    }
  }
  for (int64_t i = 0; i < c.num_experts * c.out_features; ++i) w.bias.push_back(number(random));
  w.view.format = c.format;
  w.view.num_experts = c.num_experts;
  w.view.in_features = c.in_features;
  w.view.out_features = c.out_features;
  w.view.weights = c.format == LinearFormat::kFloat32 ? static_cast<const void*>(w.floats.data())
                                                      : w.bytes.data();
  w.view.scales = w.scales.data();
  w.view.bias = c.has_bias ? w.bias.data() : nullptr;
  if (c.has_offsets) {
    w.view.offsets = w.offsets.data();
    w.view.offset_scales = w.offset_scales.data();
  }
  return w;
}

// The numbers that a row is rounded to.
std::vector<double> rounded(const float* x, int64_t n) {
  std::vector<double> found;
  for (int64_t first = 0; first < n; first += 64) {
    float largest = 0;
    for (int64_t k = first; k < std::min(n, first + 64); ++k) {
      largest = std::max(largest, std::abs(x[k]));
    }
    const float inverse = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
    for (int64_t k = first; k < std::min(n, first + 64); ++k) {
      found.push_back(static_cast<double>(std::nearbyint(x[k] * inverse)) * largest / 127);
    }
  }
  return found;
}

void check_case(const Case& c, const char* kernel) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.3f, 1.0f);
  const Weights w = make_weights(c, random);
  const int64_t num_x = c.num_rows * (c.has_own_rows ? c.num_choices : 1);
  const int64_t num_entries = c.num_rows * c.num_choices;
  std::vector<float> x(num_x * c.in_features);
  for (float& value : x) value = normal(random);
  std::vector<int64_t> index(num_entries);
  for (int64_t& expert : index) expert = static_cast<int64_t>(random() % c.num_experts);
  std::vector<float> out(num_entries * c.out_features + 1, kGuard);
  const dw::ExpertRows rows = {c.num_rows, c.num_choices, c.has_own_rows, x.data(), index.data()};
  dw::expert_linear(w.view, rows, out.data());
  double off = 0;
  double largest = 0;
  for (int64_t i = 0; i < num_entries; ++i) {
    const float* row = x.data() + (c.has_own_rows ? i : i / c.num_choices) * c.in_features;
    std::vector<double> exact(row, row + c.in_features);
    if (c.format != LinearFormat::kFloat32) exact = rounded(row, c.in_features);
    for (int64_t n = 0; n < c.out_features; ++n) {
      const int64_t at = index[i] * c.out_features + n;
      double wanted = c.has_bias ? w.bias[at] : 0;
      for (int64_t k = 0; k < c.in_features; ++k) {
        wanted += exact[k] * w.exact[at * c.in_features + k];
      }
      const double found = out[i * c.out_features + n];
      off = std::max(off, std::isfinite(found) ? std::abs(found - wanted) : INFINITY);
      largest = std::max(largest, std::abs(wanted));
    }
  }
  // A number halfway between two steps may be rounded the other way; sums of offsets have 15 bits.
  const double bound = c.format == LinearFormat::kFloat32 ? 2e-6 : c.has_offsets ? 3e-5 : 1e-5;
  CHECK(off <= bound * largest, "%s, %s: off by %g of %g", kernel, describe(c).c_str(), off,
        largest);
  CHECK(out.back() == kGuard, "%s, %s writes behind out", kernel, describe(c).c_str());
}

void check_shapes(const char* kernel) {
  for (const LinearFormat format :
       {LinearFormat::kFloat32, LinearFormat::kInt8, LinearFormat::kInt4}) {
    for (const int64_t num_rows : {1, 2, 5, 13, 40}) {
      for (const bool has_own_rows : {false, true}) {
        for (const bool has_offsets : {false, true}) {
          if (has_offsets && format != LinearFormat::kInt4) continue;
          check_case({format, num_rows, 2, 5, 64, 48, has_own_rows, has_own_rows, has_offsets},
                     kernel);
          check_case({format, num_rows, 3, 4, 96, 37, has_own_rows, !has_own_rows, has_offsets},
                     kernel);
          check_case({format, num_rows, 1, 1, 32, 176, has_own_rows, false, has_offsets}, kernel);
        }
      }
      if (format != LinearFormat::kInt4)
        check_case({format, num_rows, 2, 3, 27, 9, false, true, false}, kernel);
    }
  }
}

// Rows that are packed once give what they give by themselves, and rows of a table are its weights.
void check_packed(const char* kernel, LinearFormat format, bool has_offsets) {
  const Case c = {format, 9, 1, 1, 96, 41, false, true, has_offsets};
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  const Weights w = make_weights(c, random);
  std::vector<float> x(9 * 96);
  for (float& value : x) value = normal(random);
  const std::vector<int64_t> index(9, 0);
  std::vector<float> wanted(9 * 41);
  std::vector<float> found(9 * 41);
  dw::expert_linear(w.view, {9, 1, false, x.data(), index.data()}, wanted.data());
  std::vector<uint8_t> packed(9 * dw::linear_row_bytes(96));
  dw::pack_rows({dw::RowKind::kPlain, x.data(), nullptr, 0}, 9, 96, packed.data());
  dw::linear(w.view, packed.data(), 9, found.data());
  CHECK(found == wanted, "%s: packed rows of %s", kernel, format_name(format));
  double off = 0;
  for (int64_t n = 0; n < 41; ++n) {
    std::vector<float> row(96);
    dw::read_linear_row(w.view, n, row.data());
    for (int64_t k = 0; k < 96; ++k) off = std::max(off, std::abs(row[k] - w.exact[n * 96 + k]));
  }
  CHECK(off < 1e-5, "%s: rows of a table of %s are off by %g", kernel, format_name(format), off);
}

// What is computed of rows on the way is what comes out where it was computed before.
void check_kinds(const char* kernel) {
  const Case c = {LinearFormat::kInt8, 5, 1, 1, 200, 17, false, false, false};
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const Weights w = make_weights(c, random);
  std::vector<float> x(5 * 200);
  std::vector<float> other(5 * 200);
  for (float& value : x) value = normal(random);
  for (float& value : other) value = normal(random);
  x[3] = 100;
  x[4] = -100;
  for (const dw::RowKind kind : {dw::RowKind::kSilu, dw::RowKind::kGelu, dw::RowKind::kNormed}) {
    std::vector<float> before(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i];
      double mean = 0;
      for (size_t k = 0; k < 200; ++k) mean += std::pow(x[i / 200 * 200 + k], 2) / 200;
      const double y = std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v);
      before[i] = static_cast<float>(kind == dw::RowKind::kSilu ? v / (1 + std::exp(-v)) * other[i]
                                     : kind == dw::RowKind::kGelu
                                         ? v * 0.5 * (1 + std::tanh(y)) * other[i]
                                         : v / std::sqrt(mean + 1e-5) * other[i % 200]);
    }
    std::vector<uint8_t> packed(5 * dw::linear_row_bytes(200));
    std::vector<float> wanted(5 * 17);
    std::vector<float> found(5 * 17);
    dw::pack_rows({dw::RowKind::kPlain, before.data(), nullptr, 0}, 5, 200, packed.data());
    dw::linear(w.view, packed.data(), 5, wanted.data());
    dw::pack_rows({kind, x.data(), other.data(), 1e-5f}, 5, 200, packed.data());
    dw::linear(w.view, packed.data(), 5, found.data());
    double off = 0;
    double largest = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      off = std::max<double>(off, std::abs(found[i] - wanted[i]));
      largest = std::max<double>(largest, std::abs(wanted[i]));
    }
    // A number halfway between two steps may be rounded the other way.
    CHECK(off <= 2e-3 * largest, "%s: kind %d is off by %g of %g", kernel, static_cast<int>(kind),
          off, largest);
  }
}

// What is not finite in a row must not come out as a number.
void check_not_finite(const char* kernel) {
  const Case c = {LinearFormat::kInt8, 2, 1, 2, 40, 16, false, false, false};
  std::mt19937 random(7);
  const Weights w = make_weights(c, random);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> x(80, 1.0f);
    x[13] = bad;
    const std::vector<int64_t> index = {1, 0};
    std::vector<float> out(32, kGuard);
    dw::expert_linear(w.view, {2, 1, false, x.data(), index.data()}, out.data());
    const bool is_right =
        std::none_of(out.begin(), out.begin() + 16,
                     [](float value) { return std::isfinite(value); }) &&
        std::all_of(out.begin() + 16, out.end(), [](float value) { return std::isfinite(value); });
    CHECK(is_right, "%s: a row with %g", kernel, static_cast<double>(bad));
  }
}

void check_index() {
  const std::vector<int64_t> index = {0, 3, 4, -1};
  CHECK((dw::are_experts({1, 2, false, nullptr, index.data()}, 4)), "0 and 3 of 4");
  CHECK((!dw::are_experts({1, 3, false, nullptr, index.data()}, 4)), "4 of 4");
  CHECK((!dw::are_experts({1, 1, false, nullptr, index.data() + 3}, 4)), "-1");
}

void check_sum() {
  const std::vector<float> x = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  const std::vector<float> scores = {1, 10, 2, -1};
  std::vector<float> out(6);
  dw::expert_sum(x.data(), scores.data(), out.data(), 2, 2, 3);
  const std::vector<float> wanted = {41, 52, 63, 4, 5, 6};
  CHECK(out == wanted, "%g, …", static_cast<double>(out[0]));
}

}  // namespace

int main() {
  for (const dw::LinearKernel* const* kernel = dw::linear_kernels(); *kernel != nullptr; ++kernel) {
    dw::use_linear_kernel(*kernel);
    check_shapes((*kernel)->name);
    check_packed((*kernel)->name, LinearFormat::kInt8, false);
    check_packed((*kernel)->name, LinearFormat::kInt4, false);
    check_packed((*kernel)->name, LinearFormat::kInt4, true);
    check_kinds((*kernel)->name);
    check_not_finite((*kernel)->name);
  }
  dw::use_linear_kernel(nullptr);
  check_index();
  check_sum();
  return check::finish();
}

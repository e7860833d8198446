#include "doubleweave/cache_format.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace doubleweave {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The numbers below have no branches, so that compilers make vectors of the loops.

uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  const uint32_t quiet = bits | 0x400000;  // a NaN must not be rounded to an infinity
  return static_cast<uint16_t>((x != x ? quiet : rounded) >> 16);
}

uint16_t float16_of(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14 halves are whole multiples of 2^-24: adding 1/2 rounds to them in the last bits.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - (uint32_t{112} << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude < (uint32_t{113} << 23)   ? small
                        : magnitude < (uint32_t{143} << 23) ? normal
                                                            : large;
  return static_cast<uint16_t>(sign | half);
}

void write_int8(const float* x, int64_t dim, std::byte* out) {
  float largest = 0;
  float zeros = 0;  // NaN where a number is not finite
  for (int64_t i = 0; i < dim; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    zeros += x[i] * 0.0f;
  }
  float scale = largest / 127.0f;
  const float inverse = 127.0f / largest;
  if (zeros == 0 && inverse <= std::numeric_limits<float>::max()) {
    for (int64_t i = 0; i < dim; ++i) {
      out[i] = static_cast<std::byte>(static_cast<int8_t>(std::nearbyint(x[i] * inverse)));
    }
  } else {
    std::memset(out, 0, static_cast<size_t>(dim));
    scale = zeros == 0 ? 0 : std::numeric_limits<float>::quiet_NaN();
  }
  std::memcpy(out + dim, &scale, sizeof scale);
}

}  // namespace

const char* format_name(CacheFormat format) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8"};  // as in CacheFormat
  return kNames[static_cast<size_t>(format)];
}

int64_t head_bytes(CacheFormat format, int64_t dim) {
  switch (format) {
    case CacheFormat::kFloat32:
      return dim * 4;
    case CacheFormat::kInt8:
      return dim + static_cast<int64_t>(sizeof(float));
    default:
      return dim * 2;
  }
}

void write_cache_heads(CacheFormat format, const float* x, int64_t num_heads, int64_t dim,
                       void* out) {
  const int64_t count = num_heads * dim;
  auto* const halves = static_cast<uint16_t*>(out);
  auto* const bytes = static_cast<std::byte*>(out);
  switch (format) {
    case CacheFormat::kFloat32:
      std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
      return;
    case CacheFormat::kBfloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = bfloat16_of(x[i]);
      return;
    case CacheFormat::kFloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = float16_of(x[i]);
      return;
    case CacheFormat::kInt8:
      for (int64_t i = 0; i < num_heads; ++i) {
        write_int8(x + i * dim, dim, bytes + i * head_bytes(format, dim));
      }
      return;
  }
}

}  // namespace doubleweave

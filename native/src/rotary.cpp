#include "doubleweave/rotary.h"

#include <cstring>

// Each iteration reads what it writes before it writes it, and nothing else of x or out; the
// compiler cannot know, and would otherwise test for overlap and take the slow way in place.
#if defined(__clang__)
#define DOUBLEWEAVE_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define DOUBLEWEAVE_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace doubleweave {
namespace {

// A kernel of ours: under dynamic rows XNNPACK's delegate takes neither slices nor views.
void rotate_head(const float* x, const float* cos, const float* sin, float* out, int64_t half) {
  DOUBLEWEAVE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i];
    const float high = x[i + half];
    out[i] = low * cos[i] - high * sin[i];
    out[i + half] = high * cos[i + half] + low * sin[i + half];
  }
}

}  // namespace

void rotary(const float* x, const float* cos, const float* sin, float* out, int64_t num_tokens,
            int64_t num_heads, int64_t head_dim, int64_t rotary_dim) {
  const auto tail_bytes = static_cast<size_t>(head_dim - rotary_dim) * sizeof(float);
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int64_t head = 0; head < num_heads; ++head) {
      rotate_head(x, cos, sin, out, rotary_dim / 2);
      if (tail_bytes > 0 && out != x) std::memcpy(out + rotary_dim, x + rotary_dim, tail_bytes);
      x += head_dim;
      out += head_dim;
    }
    cos += rotary_dim;
    sin += rotary_dim;
  }
}

}  // namespace doubleweave

// What one compilation of the attention kernel offers to the dispatcher (internal).
//
// This header is also read by files compiled for instruction sets that the machine may lack, so it
// (and everything they include) must define no inline function: the linker might keep that copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "doubleweave/attention.h"

namespace doubleweave {

struct AttentionInputs {
  const float* q;
  const std::byte* k;  // of the cache's format
  const std::byte* v;
  float* out;
  float* scratch;  // 64-byte aligned, num_scratch_floats(params) long
};

struct AttentionKernel {
  Isa isa;
  int64_t (*num_scratch_floats)(const AttentionParams& params);
  int64_t (*num_row_blocks)(const AttentionParams& params);  // of one kv head
  void (*run)(const AttentionParams& params, const AttentionInputs& inputs, int64_t kv_head,
              int64_t row_block);
  // Of a few rows, which go through the keys in ranges, of all kv heads at once; 0 for more rows.
  int64_t (*num_key_ranges)(const AttentionParams& params);
  // Writes partial results [T, H, Dv + 2] to `out`: sums of values times weights, relative to the
  // largest score, then that score in base 2, and the sum of weights.
  void (*run_range)(const AttentionParams& params, const AttentionInputs& inputs, int64_t range,
                    int64_t num_ranges);
  bool (*rounds_to_bfloat16)(CacheFormat format);  // queries and weights
};

// Only those that the target architecture can have are defined.
namespace baseline {
extern const AttentionKernel kKernel;
}
namespace avx2 {
extern const AttentionKernel kKernel;
}
namespace avx512 {
extern const AttentionKernel kKernel;
}
namespace avx512bf16 {
extern const AttentionKernel kKernel;
}
namespace neon {
extern const AttentionKernel kKernel;
}
namespace neonbf16 {
extern const AttentionKernel kKernel;
}

}  // namespace doubleweave

// What one compilation of the kernel of linears offers to the dispatcher (internal).
//
// This header is also read by files compiled for instruction sets that the machine may lack, so it
// (and everything they include) must define no inline function: the linker might keep that copy.
#pragma once

#include <cstdint>

#include "doubleweave/linears.h"

namespace doubleweave {

// A packed row of `num_groups` times 64 numbers: where its arrays begin, in bytes.
struct PackedRow {
  int64_t scales;  // float, one a group: the step of its grid
  // int32, one a group: minus the sum of its numbers times what is added to a weight of kInt8.
  int64_t sums_int8;
  int64_t sums_int4;  // int32, one for each 32 numbers: the same of kInt4
  // int16, one for each 32: what they stand for, added up, in steps of `sum_step`.
  int64_t half_sums;
  int64_t sum_step;  // float
};
[[maybe_unused]] static constexpr PackedRow packed_row(int64_t num_groups) {  // each file's own
  // The numbers themselves come first: a byte each, or two where instructions multiply those.
  const int64_t scales = num_groups * 128;
  return {scales, scales + num_groups * 4, scales + num_groups * 8, scales + num_groups * 16,
          scales + num_groups * 20};
}

// The product of one linear's (or expert's) rows with some of its blocks.
struct LinearTile {
  LinearFormat format;
  int64_t in_features;
  int64_t out_features;
  const uint8_t* weights;  // of the expert, as are the next four
  const uint8_t* scales;
  const int8_t* offsets;
  const float* offset_scales;
  const float* bias;
  const uint8_t* next;  // next_bytes that are likely to be read after this tile
  int64_t next_bytes;
  int64_t first_block;
  int64_t end_block;
  int64_t num_rows;
  const int32_t* entries;  // rows of out
  int32_t num_choices;     // an entry's row of x is entry / num_choices
  const float* x;          // kFloat32
  const uint8_t* packed;   // kInt8 and kInt4: rows of `row_bytes`
  int64_t row_bytes;
  float* out;
};

struct LinearKernel {
  const char* name;
  // Rounds the first row of a source.
  void (*pack_row)(const RowSource& source, int64_t in_features, uint8_t* packed);
  void (*run)(const LinearTile& tile);
};

// The kernels that this build and this machine have, best first, null at the end.
const LinearKernel* const* linear_kernels();

// Takes a kernel for tests (null: the best one). Not while another thread computes.
void use_linear_kernel(const LinearKernel* kernel);

// Only those that the target architecture can have are defined.
namespace linears_baseline {
extern const LinearKernel kKernel;
}
namespace linears_avx2 {
extern const LinearKernel kKernel;
}
namespace linears_avxvnni {
extern const LinearKernel kKernel;
}
namespace linears_avx512vnni {
extern const LinearKernel kKernel;
}
namespace linears_neon {
extern const LinearKernel kKernel;
}
namespace linears_neondot {
extern const LinearKernel kKernel;
}

}  // namespace doubleweave

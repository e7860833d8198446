// What one compilation of the kernel of linears offers to the dispatcher (internal).
//
// This header is also read by files compiled for instruction sets that the machine may lack, so it
// (and everything they include) must define no inline function: the linker might keep that copy.
#pragma once

#include <cstdint>

#include "doubleweave/linears.h"

namespace doubleweave {

// Rows on their int8 grids.
struct PackedRows {
  uint8_t* data;  // row_bytes each
  float* scales;  // a step of each row's grid
  float* zeros;   // where zero is on each row's grid
  int32_t* sums;  // row_sums each: minus the sum of a row's (or group's) numbers times what is
                  // added to a weight
  int16_t* group_sums;  // kInt4: the sums of a row's groups, and 0 up to whole pairs
};

// The product of one linear's (or expert's) rows with some of its blocks.
struct LinearTile {
  LinearFormat format;
  int64_t in_features;
  int64_t out_features;
  const uint8_t* weights;  // of the expert, as are the next five
  const uint8_t* scales;
  const int8_t* offsets;
  const float* offset_scales;
  const float* sums;
  const float* bias;
  const uint8_t* next;  // next_bytes that are likely to be read after this tile
  int64_t next_bytes;
  int64_t first_block;
  int64_t end_block;
  int64_t num_rows;
  const int32_t* entries;  // rows of out
  int32_t num_choices;     // an entry's row of x is entry / num_choices
  const float* x;          // kFloat32
  PackedRows packed;       // kInt8 and kInt4
  float* out;
};

// Of a packed row: one for all of it (kInt8), or one a group (kInt4).
int64_t linear_row_sums(LinearFormat format, int64_t in_features);

struct LinearKernel {
  const char* name;
  int64_t (*row_bytes)(int64_t in_features);
  // Rounds a row and writes it to packed rows that begin with it.
  void (*pack_row)(LinearFormat format, const float* x, int64_t in_features,
                   const PackedRows& packed);
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

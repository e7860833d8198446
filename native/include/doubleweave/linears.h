// Linears over weights of few bits, and those of a mixture of experts: each row is multiplied by
// the weights of the experts that it chose, and only those are read. Rows of one expert are
// multiplied together.
//
// Weights lie in the order in which the kernel reads them (packed_linears.py writes it): 16 output
// features, a block, beside one another. Those of few bits are in bundles of four blocks, the last
// one of what is left: one row's product goes through a bundle from end to end. Input features are
// padded with zeros to whole groups (kInt8) and output features to whole blocks.
//
// Rows are rounded to int8, each 64 numbers on a grid of their own around zero, from the largest of
// them; linears that read the same rows share that (pack_rows).
#pragma once

#include <cstddef>
#include <cstdint>

namespace doubleweave {

enum class LinearFormat {
  kFloat32,  // [experts, blocks, in_features, 16] float
  // [experts, bundles, groups of 64, blocks of the bundle, 16, 16, 4] bytes: the weight + 128
  kInt8,
  // [experts, bundles, groups of 32, blocks of the bundle, 4, 16, 4] bytes: the weight + 8 of a
  // group's feature 8 i + j in the low half and of feature 8 i + 4 + j in the high half.
  kInt4,
};

constexpr int64_t kLinearBlock = 16;  // output features
constexpr int64_t kLinearBundle = 4;  // blocks
constexpr int64_t kLinearGroup = 32;  // input features of one scale (kInt4)
constexpr int64_t kInt8Group = 64;  // input features of one scale (kInt8), and of one grid of a row

// Most input features of kInt4: sums of their offsets' products stay in 32 bits.
constexpr int64_t kMostInt4Features = int64_t{1} << 16;

// Bytes of a block's weights.
int64_t linear_block_bytes(LinearFormat format, int64_t in_features);

// Input features that have one scale; 0 where there are none.
int64_t linear_scale_group(LinearFormat format);

// Groups of 64; offsets are stored for two of 32 at a time.
int64_t linear_group_pairs(int64_t in_features);

// Bytes of a packed row, the same on every machine.
int64_t linear_row_bytes(int64_t in_features);

struct LinearWeights {
  LinearFormat format;
  int64_t num_experts;
  int64_t in_features;  // kInt4: a multiple of kLinearGroup
  int64_t out_features;
  const void* weights;
  const void* scales;  // bfloat16 [experts, bundles, groups, blocks, 16]
  // kInt4, or both null: [experts, bundles, group pairs, blocks, 16, 2], what is added to each
  // weight of a group in steps of its output feature's [experts, blocks, 16].
  const int8_t* offsets;
  const float* offset_scales;
  const float* bias;  // [experts, out_features], or null
};

struct ExpertRows {
  int64_t num_rows;
  int64_t num_choices;
  bool has_own_rows;     // each choice has a row of x; else the choices of a row share it
  const float* x;        // [num_rows, in_features], or [num_rows, num_choices, in_features]
  const int64_t* index;  // [num_rows, num_choices]: experts
};

// Whether every choice is an expert that there is.
bool are_experts(const ExpertRows& rows, int64_t num_experts);

// out [num_rows, num_choices, out_features] must overlap nothing else. Choices must be experts.
// For kInt8 and kInt4 rows are rounded; a row that is not finite gives NaN. Uses the intra-operator
// threads (threads.h).
void expert_linear(const LinearWeights& weights, const ExpertRows& rows, float* out);

// What is computed of a row before it is rounded, so that it is never in memory.
enum class RowKind : int64_t {
  kPlain,
  kSilu,    // silu(x) * other, [num_rows, in_features]
  kGelu,    // gelu(x) * other, by tanh
  kNormed,  // x / sqrt(mean(x^2) + epsilon) * other, [in_features]
};
struct RowSource {
  RowKind kind;
  const float* x;  // [num_rows, in_features]
  const float* other;
  float epsilon;
};

// Rounds rows into linear_row_bytes each.
void pack_rows(const RowSource& source, int64_t num_rows, int64_t in_features, uint8_t* packed);

// The product of packed rows with the weights of one linear, kInt8 or kInt4: out [num_rows,
// out_features].
void linear(const LinearWeights& weights, const uint8_t* packed, int64_t num_rows, float* out);

// Reads an output feature's weights of kInt8 or kInt4, [in_features]: a row of a table.
void read_linear_row(const LinearWeights& weights, int64_t feature, float* out);

// out [num_rows, width]: the sum of each row's results x [num_rows, num_choices, width], each
// times its score [num_rows, num_choices].
void expert_sum(const float* x, const float* scores, float* out, int64_t num_rows,
                int64_t num_choices, int64_t width);

}  // namespace doubleweave

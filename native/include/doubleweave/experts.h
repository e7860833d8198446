// Linears of a mixture of experts: each row is multiplied by the weights of the experts that it
// chose, and only those are read. Rows of one expert are multiplied together.
//
// Weights lie in the order in which the kernel reads them (packed_experts.py writes it): 16 output
// features, a block, beside one another. Input features are padded with zeros to a multiple of 4
// (kInt8) and output features to whole blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace doubleweave {

enum class ExpertFormat {
  kFloat32,  // [experts, blocks, in_features, 16] float
  kInt8,     // [experts, blocks, in_features / 4, 16, 4] bytes: the weight + 128
  // [experts, blocks, in_features / 8, 16, 4] bytes: the weight + 8 of feature 8 i + j in the low
  // half and of feature 8 i + 4 + j in the high half
  kInt4,
};

constexpr int64_t kExpertBlock = 16;  // output features
constexpr int64_t kExpertGroup = 32;  // input features of one scale (kInt4)

// Bytes of a block's weights.
int64_t expert_block_bytes(ExpertFormat format, int64_t in_features);

struct ExpertWeights {
  ExpertFormat format;
  int64_t num_experts;
  int64_t in_features;  // kInt4: a multiple of kExpertGroup
  int64_t out_features;
  const void* weights;
  // kInt8: float [experts, blocks, 16]; kInt4: bfloat16 [experts, blocks, groups, 16].
  const void* scales;
  const float* sums;  // [experts, blocks, 16]: each output feature's weights times scales, added up
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
// For kInt8 and kInt4 a row is rounded to an int8 grid of its own, from its least to its largest
// number; a row that is not finite gives NaN. Uses the intra-operator threads (threads.h).
void expert_linear(const ExpertWeights& weights, const ExpertRows& rows, float* out);

// out [num_rows, width]: the sum of each row's results x [num_rows, num_choices, width], each
// times its score [num_rows, num_choices].
void expert_sum(const float* x, const float* scores, float* out, int64_t num_rows,
                int64_t num_choices, int64_t width);

}  // namespace doubleweave

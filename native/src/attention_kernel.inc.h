// The attention kernel: the one source, compiled once for each instruction set by the small files
// attention_<isa>.cpp, which define the namespace, the vector width and the number of registers.
//
// Shapes
//   T queries, S keys, D head size, Dv value size; H heads share Hkv kv heads, G = H / Hkv each.
//   W = kLanes floats in a vector.
//   row: one query of one head. A kv head has T * G rows, row r being token r / G, head r % G.
//   row block: up to kMaxVectors * W rows, held in the lanes of kVectors vectors.
//
// Prompts: rows are the lanes. For a row block, queries and output live transposed in scratch:
//   queries [D, R]   weights [kKeyBlock, R]   output [Dv, R]     with R = kVectors * W
// so both products are the same loop, which broadcasts single floats of k or v, in place, against
// vectors of rows; k and v are never packed, and maxima and sums of the softmax need no shuffles.
// Single tokens: rows would leave the lanes empty, so attention_decode.inc.h puts D in the lanes.
//
// The softmax is online, over blocks of keys: Milakov and Gimelshein, "Online normalizer
// calculation for softmax" (2018); Dao et al., "FlashAttention" (2022). It runs in base 2, log2(e)
// being folded into the queries.
//
// Everything here has internal linkage, and the standard library gives types only: an inline
// function compiled here for AVX-512 could otherwise replace the portable copy at link time.

#include <cstdint>
#include <utility>

#include "attention_kernel.h"

namespace doubleweave {
namespace DOUBLEWEAVE_ISA_NAMESPACE {
namespace {

#include "attention_vector.inc.h"

// Output tiles of the product loop are kTile x kVectors vectors; 8 x 3 fills 32 registers and 4 x 3
// fills 16, with one for the broadcast and three for the row vectors.
constexpr int kTile = DOUBLEWEAVE_VECTOR_REGISTERS / 4;
constexpr int kMaxVectors = 3;
constexpr int kKeyBlock = 64;  // weights of a row block stay in L1
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -0x1.fffffep127f;  // finite: -infinity - -infinity would be NaN

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct KeyRange {
  int64_t begin, end;
};

KeyRange keys_seen_by(const AttentionParams& params, int64_t token) {
  if (!params.causal) return {0, params.num_keys};
  const int64_t end = params.num_keys - params.num_queries + token + 1;
  const bool windowed = params.window > 0 && params.window < end;
  const int64_t begin = windowed ? end - params.window : 0;
  const int64_t block_begin = params.block > 0 ? (end - 1) / params.block * params.block : 0;
  return {begin > block_begin ? begin : block_begin, end};
}

int64_t group_size(const AttentionParams& params) { return params.num_heads / params.num_kv_heads; }

// The row after row: the next head of the group, or the next token.
struct Row {
  int64_t token;
  int64_t member;  // of the group
};

Row row_at(const AttentionParams& params, int64_t index) {
  const int64_t group = group_size(params);
  return {index / group, index % group};
}

void advance(const AttentionParams& params, Row& row) {
  if (++row.member < group_size(params)) return;
  row.member = 0;
  ++row.token;
}

// Where a row's vector of `dim` floats starts in q or out.
int64_t row_offset(const AttentionParams& params, int64_t kv_head, Row row, int64_t dim) {
  const int64_t head = kv_head * group_size(params) + row.member;
  return (row.token * params.num_heads + head) * dim;
}

// What queries are multiplied with when they are copied, and what the result still lacks.
float query_factor(const AttentionParams& params) {
  return params.soft_cap > 0 ? params.scale / params.soft_cap : params.scale * kLog2E;
}

// The softmax starts at the sink as if it were a key, with a weight of 1 and no value.
float first_max(const AttentionParams& params, int64_t kv_head, Row row) {
  if (params.sinks == nullptr) return kLowest;
  return params.sinks[kv_head * group_size(params) + row.member] * kLog2E;
}

float first_total(const AttentionParams& params) { return params.sinks == nullptr ? 0.0f : 1.0f; }

// What is added to the score of a key for each token that it lies behind.
float slope_of(const AttentionParams& params, int64_t kv_head, Row row) {
  return params.slopes[kv_head * group_size(params) + row.member] * kLog2E;
}

// The numbers that a row's keys have by their distance, of the row's head.
const float* distances_of(const AttentionParams& params, int64_t kv_head, Row row) {
  if (params.distances == nullptr) return nullptr;
  return params.distances + (kv_head * group_size(params) + row.member) * params.num_distances;
}

// What is added to the score of a key that lies so far behind its query; keys ahead are masked.
float at_distance(const AttentionParams& params, const float* distances, int64_t distance) {
  return distances[min(distance < 0 ? 0 : distance, params.num_distances - 1)] * kLog2E;
}

DOUBLEWEAVE_INLINE Vec apply_soft_cap(const AttentionParams& params, Vec score) {
  return splat(params.soft_cap * kLog2E) * tanh(score);
}

#include "attention_decode.inc.h"

// Scores, maxima and sums of the rows that share each load of k and v.
template <int kVectors>
struct RowBlock {
  static constexpr int kRows = kVectors * kLanes;

  const AttentionParams& params;
  int64_t kv_head;
  float* queries;     // [D, kRows]
  float* weights;     // [kKeyBlock, kRows]: scores, then their exponentials
  float* output;      // [Dv, kRows], to be divided by `total`
  Row rows[kRows]{};  // lanes past the last row repeat it
  KeyRange seen_by_some{};
  KeyRange seen_by_all{};
  IntVec first_key[kVectors]{};
  IntVec last_key[kVectors]{};
  IntVec position[kVectors]{};  // of the queries
  Vec running_max[kVectors]{};
  Vec block_max[kVectors]{};
  Vec correction[kVectors]{};  // what the previous blocks' sums are multiplied with
  Vec total[kVectors]{};
  Vec slope[kVectors]{};
  const float* distances[kRows]{};  // used where there are distances
};

// acc[m][j] = sum over i < depth of a[m * row_stride + i * depth_stride] * b[i][j]
template <int kCount, int kVectors>
DOUBLEWEAVE_INLINE void multiply(const float* a, int64_t row_stride, int64_t depth_stride,
                                 const float* b, int64_t depth, Vec (&acc)[kCount][kVectors]) {
  DOUBLEWEAVE_UNROLL
  for (int m = 0; m < kCount; ++m) {
    DOUBLEWEAVE_UNROLL
    for (int j = 0; j < kVectors; ++j) acc[m][j] = Vec{};
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vec row[kVectors];
    DOUBLEWEAVE_UNROLL
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + (i * kVectors + j) * kLanes);
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const Vec factor = splat(a[m * row_stride + i * depth_stride]);
      DOUBLEWEAVE_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[m][j] += factor * row[j];
    }
  }
}

// Scores of keys [key, key + kCount), masked where not every row sees them.
// Not inlined, so that each tile's accumulators have the registers to themselves: where they spill,
// the product loop loses half of its speed (in a first version 30 instead of 55 GFLOP/s).
template <int kCount, int kVectors>
__attribute__((noinline)) void score_tile(RowBlock<kVectors>& block, const float* k, int64_t key,
                                          float* scores) {
  const AttentionParams& params = block.params;
  const int64_t stride = params.num_kv_heads * params.head_dim;
  Vec acc[kCount][kVectors];
  multiply(k + key * stride, stride, 1, block.queries, params.head_dim, acc);
  if (params.soft_cap > 0) {
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      DOUBLEWEAVE_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[m][j] = apply_soft_cap(params, acc[m][j]);
    }
  }
  if (params.slopes != nullptr) {
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const IntVec index = splat_int(static_cast<int32_t>(key + m));
      DOUBLEWEAVE_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        acc[m][j] += block.slope[j] * __builtin_convertvector(index - block.position[j], Vec);
      }
    }
  }
  if (params.distances != nullptr) {
    for (int m = 0; m < kCount; ++m) {
      for (int j = 0; j < kVectors; ++j) {
        float added[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          added[lane] = at_distance(params, block.distances[j * kLanes + lane],
                                    block.position[j][lane] - (key + m));
        }
        acc[m][j] += load(added);
      }
    }
  }
  // Most tiles lie below the diagonal, where every row sees every key: no mask is worked out there.
  if (key < block.seen_by_all.begin || key + kCount > block.seen_by_all.end) {
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const IntVec index = splat_int(static_cast<int32_t>(key + m));
      DOUBLEWEAVE_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const IntVec seen = (index >= block.first_key[j]) & (index <= block.last_key[j]);
        acc[m][j] = seen ? acc[m][j] : splat(-__builtin_inff());
      }
    }
  }
  DOUBLEWEAVE_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    Vec largest = block.block_max[j];
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      largest = max(acc[m][j], largest);
      store(scores + (m * kVectors + j) * kLanes, acc[m][j]);
    }
    block.block_max[j] = largest;
  }
}

template <int kVectors>
void score_keys(RowBlock<kVectors>& block, const float* k, KeyRange keys) {
  DOUBLEWEAVE_UNROLL
  for (int j = 0; j < kVectors; ++j) block.block_max[j] = block.running_max[j];
  int64_t key = keys.begin;
  float* scores = block.weights;
  for (; key + kTile <= keys.end; key += kTile, scores += kTile * block.kRows) {
    score_tile<kTile>(block, k, key, scores);
  }
  for (; key < keys.end; ++key, scores += block.kRows) score_tile<1>(block, k, key, scores);
}

// Turns scores into weights relative to the largest score so far.
template <int kVectors>
__attribute__((noinline)) void exponentiate(RowBlock<kVectors>& block, int64_t num_keys) {
  Vec sum[kVectors];
  Vec largest[kVectors];
  DOUBLEWEAVE_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    largest[j] = block.block_max[j];
    block.correction[j] = exp2(block.running_max[j] - largest[j]);
    block.running_max[j] = largest[j];
    sum[j] = Vec{};
  }
  float* const weights = block.weights;
  for (int64_t i = 0; i < num_keys; ++i) {
    DOUBLEWEAVE_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      float* p = weights + (i * kVectors + j) * kLanes;
      const Vec weight = exp2(load(p) - largest[j]);
      sum[j] += weight;
      store(p, weight);
    }
  }
  DOUBLEWEAVE_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    block.total[j] = block.total[j] * block.correction[j] + sum[j];
  }
}

// Adds weights * v to columns [column, column + kCount) of the output.
template <int kCount, int kVectors>
__attribute__((noinline)) void value_tile(RowBlock<kVectors>& block, const float* v, KeyRange keys,
                                          int64_t column) {
  const int64_t stride = block.params.num_kv_heads * block.params.value_dim;
  Vec acc[kCount][kVectors];
  multiply(v + keys.begin * stride + column, 1, stride, block.weights, keys.end - keys.begin, acc);
  float* output = block.output + column * block.kRows;
  DOUBLEWEAVE_UNROLL
  for (int m = 0; m < kCount; ++m) {
    DOUBLEWEAVE_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      float* p = output + (m * kVectors + j) * kLanes;
      store(p, load(p) * block.correction[j] + acc[m][j]);
    }
  }
}

template <int kVectors>
void add_values(RowBlock<kVectors>& block, const float* v, KeyRange keys) {
  const int64_t dim = block.params.value_dim;
  int64_t column = 0;
  for (; column + kTile <= dim; column += kTile) value_tile<kTile>(block, v, keys, column);
  for (; column < dim; ++column) value_tile<1>(block, v, keys, column);
}

// Where the rows in the lanes of vector j start in q or out.
template <int kVectors>
void lane_offsets(const RowBlock<kVectors>& block, int j, int64_t dim, int64_t (&offsets)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    offsets[i] = row_offset(block.params, block.kv_head, block.rows[j * kLanes + i], dim);
  }
}

template <int kVectors>
__attribute__((noinline)) void load_queries(RowBlock<kVectors>& block, const float* q) {
  const int64_t dim = block.params.head_dim;
  const Vec factor = splat(query_factor(block.params));
  for (int j = 0; j < kVectors; ++j) {
    int64_t offsets[kLanes];
    lane_offsets(block, j, dim, offsets);
    for (int64_t column = 0; column < dim; column += kLanes) {
      Vec square[kLanes];
      DOUBLEWEAVE_UNROLL
      for (int i = 0; i < kLanes; ++i)
        square[i] = load_up_to(q + offsets[i] + column, dim - column);
      transpose(square);
      float* p = block.queries + column * block.kRows + j * kLanes;
      DOUBLEWEAVE_UNROLL
      for (int i = 0; i < kLanes; ++i) store(p + i * block.kRows, square[i] * factor);
    }
  }
}

template <int kVectors>
__attribute__((noinline)) void store_output(const RowBlock<kVectors>& block, float* out) {
  const int64_t dim = block.params.value_dim;
  for (int j = 0; j < kVectors; ++j) {
    const Vec factor = splat(1.0f) / block.total[j];
    int64_t offsets[kLanes];
    lane_offsets(block, j, dim, offsets);
    for (int64_t column = 0; column < dim; column += kLanes) {
      const float* p = block.output + column * block.kRows + j * kLanes;
      Vec square[kLanes];
      DOUBLEWEAVE_UNROLL
      for (int i = 0; i < kLanes; ++i) square[i] = load(p + i * block.kRows) * factor;
      transpose(square);
      DOUBLEWEAVE_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        store_up_to(out + offsets[i] + column, square[i], dim - column);
      }
    }
  }
}

template <int kVectors>
void set_rows(RowBlock<kVectors>& block, int64_t first_row, int64_t num_rows) {
  Row row = row_at(block.params, first_row);
  for (int64_t lane = 0; lane < block.kRows; ++lane) {
    block.rows[lane] = row;
    const KeyRange seen = keys_seen_by(block.params, row.token);
    block.first_key[lane / kLanes][lane % kLanes] = static_cast<int32_t>(seen.begin);
    block.last_key[lane / kLanes][lane % kLanes] = static_cast<int32_t>(seen.end - 1);
    block.position[lane / kLanes][lane % kLanes] =
        static_cast<int32_t>(block.params.num_keys - block.params.num_queries + row.token);
    block.running_max[lane / kLanes][lane % kLanes] = first_max(block.params, block.kv_head, row);
    block.total[lane / kLanes][lane % kLanes] = first_total(block.params);
    if (block.params.slopes != nullptr) {
      block.slope[lane / kLanes][lane % kLanes] = slope_of(block.params, block.kv_head, row);
    }
    block.distances[lane] = distances_of(block.params, block.kv_head, row);
    if (lane + 1 < num_rows) advance(block.params, row);
  }
  const KeyRange first = keys_seen_by(block.params, block.rows[0].token);
  const KeyRange last = keys_seen_by(block.params, row.token);
  block.seen_by_some = {first.begin, last.end};
  block.seen_by_all = {last.begin, first.end};
}

template <int kVectors>
void run_row_block(const AttentionParams& params, const AttentionInputs& inputs, int64_t kv_head,
                   int64_t first_row, int64_t num_rows) {
  constexpr int kRows = kVectors * kLanes;
  float* queries = inputs.scratch;
  float* weights = queries + round_up(params.head_dim, kLanes) * kRows;
  float* output = weights + kKeyBlock * kRows;
  RowBlock<kVectors> block{.params = params,
                           .kv_head = kv_head,
                           .queries = queries,
                           .weights = weights,
                           .output = output};
  set_rows(block, first_row, num_rows);
  load_queries(block, inputs.q);
  for (int64_t i = 0; i < params.value_dim * kVectors; ++i) store(output + i * kLanes, Vec{});

  const float* k = inputs.k + kv_head * params.head_dim;
  const float* v = inputs.v + kv_head * params.value_dim;
  const KeyRange seen = block.seen_by_some;
  // Whole tiles of masked keys are cheaper than single keys.
  const int64_t end = min(params.num_keys, seen.begin + round_up(seen.end - seen.begin, kTile));
  for (int64_t key = seen.begin; key < end; key += kKeyBlock) {
    const KeyRange keys = {key, min(end, key + kKeyBlock)};
    score_keys(block, k, keys);
    exponentiate(block, keys.end - keys.begin);
    add_values(block, v, keys);
  }
  store_output(block, inputs.out);
}

int64_t num_row_vectors(const AttentionParams& params) {
  return ceil_div(params.num_queries * group_size(params), kLanes);
}

int64_t num_row_blocks(const AttentionParams& params) {
  return decodes(params) ? 1 : ceil_div(num_row_vectors(params), kMaxVectors);
}

int64_t num_scratch_floats(const AttentionParams& params) {
  if (decodes(params)) return decode_scratch_floats(params);
  const int64_t dims = round_up(params.head_dim, kLanes) + round_up(params.value_dim, kLanes);
  return (dims + kKeyBlock) * kMaxVectors * kLanes;
}

void run(const AttentionParams& params, const AttentionInputs& inputs, int64_t kv_head,
         int64_t row_block) {
  if (decodes(params)) return decode(params, inputs, kv_head);
  // Spread the vectors evenly, so that no block is left with one: a block's loads of k and v cost
  // the same for one vector as for three.
  const int64_t vectors = num_row_vectors(params);
  const int64_t blocks = num_row_blocks(params);
  const int64_t begin = row_block * vectors / blocks;
  const int64_t end = (row_block + 1) * vectors / blocks;
  const int64_t first_row = begin * kLanes;
  const int64_t num_rows = min(end * kLanes, params.num_queries * group_size(params)) - first_row;
  switch (end - begin) {
    case 1:
      return run_row_block<1>(params, inputs, kv_head, first_row, num_rows);
    case 2:
      return run_row_block<2>(params, inputs, kv_head, first_row, num_rows);
    default:
      return run_row_block<3>(params, inputs, kv_head, first_row, num_rows);
  }
}

}  // namespace

extern const AttentionKernel kKernel = {DOUBLEWEAVE_ISA, num_row_blocks, num_scratch_floats, run};

}  // namespace DOUBLEWEAVE_ISA_NAMESPACE
}  // namespace doubleweave

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
// so both products are the same loop, which broadcasts single floats of k or v against vectors of
// rows; k and v are never packed, and maxima and sums of the softmax need no shuffles. Float32 is
// read in place; of other formats each row block unpacks a block of keys at a time, for which it
// takes a few hundredths of its time (AVX-512: 4 loads, shifts and stores for 96 multiply-adds).
// Where there are products of pairs of bfloat16 (attention_pairs.inc.h), the loop broadcasts pairs.
// Single tokens: rows would leave the lanes empty, so attention_decode.inc.h puts D in the lanes.
//
// The softmax is online, over blocks of keys: Milakov and Gimelshein, "Online normalizer
// calculation for softmax" (2018); Dao et al., "FlashAttention" (2022). It runs in base 2, log2(e)
// being folded into the queries.
//
// Everything here has internal linkage, and the standard library gives types only: an inline
// function compiled here for AVX-512 could otherwise replace the portable copy at link time.

#include <cstddef>
#include <cstdint>
#include <utility>

#include "attention_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(DOUBLEWEAVE_BF16_PAIRS)
#include <arm_neon.h>
#endif

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

#include "attention_formats.inc.h"

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
#include "attention_pairs.inc.h"

#if defined(DOUBLEWEAVE_BF16_PAIRS)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

bool rounds_to_bfloat16(CacheFormat format) {
  return kHasPairs && (format == CacheFormat::kBfloat16 || format == CacheFormat::kInt8);
}

// Scores, maxima and sums of the rows that share each load of k and v.
// kPairs: queries and weights are pairs, of neighbouring dims and of neighbouring keys.
template <int kVectors, bool kPairs>
struct RowBlock {
  static constexpr int kRows = kVectors * kLanes;

  const AttentionParams& params;
  int64_t kv_head;
  float* queries{};   // [D, kRows], or [D / 2, kRows] pairs
  float* weights{};   // [kKeyBlock, kRows]: scores, then their exponentials
  float* output{};    // [Dv, kRows], to be divided by `total`
  float* keys{};      // [kKeyBlock, D] and
  float* values{};    // [kKeyBlock, Dv], where they are not read in place
  float* scales{};    // [2, kKeyBlock] of keys and values, where they are not multiplied in
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

// acc[m][j] = sum over i < depth of a[m * row_stride + i * depth_stride] * b[i][j], where a's
// numbers are floats or pairs, and strides are bytes.
template <bool kPairs, int kCount, int kVectors>
DOUBLEWEAVE_INLINE void multiply(const std::byte* a, int64_t row_stride, int64_t depth_stride,
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
      const std::byte* p = a + m * row_stride + i * depth_stride;
      if constexpr (kPairs) {
        const Vec factor = reinterpret_cast<Vec>(splat_int(*reinterpret_cast<const MemoryInt*>(p)));
        DOUBLEWEAVE_UNROLL
        for (int j = 0; j < kVectors; ++j) acc[m][j] = add_pairs(acc[m][j], factor, row[j]);
      } else {
        const Vec factor = splat(float_at(p));
        DOUBLEWEAVE_UNROLL
        for (int j = 0; j < kVectors; ++j) acc[m][j] += factor * row[j];
      }
    }
  }
}

// What else becomes of the scores of keys [key, key + count), and which of them each row sees.
// By itself, so that the tiles that need none of it (most lie below the diagonal, where every row
// sees every key) keep their scores in registers.
template <int kVectors, bool kPairs>
__attribute__((noinline)) void adjust_scores(RowBlock<kVectors, kPairs>& block, int64_t key,
                                             int64_t count, float* scores) {
  const AttentionParams& params = block.params;
  for (int64_t m = 0; m < count; ++m) {
    const IntVec index = splat_int(static_cast<int32_t>(key + m));
    for (int j = 0; j < kVectors; ++j) {
      float* p = scores + (m * kVectors + j) * kLanes;
      Vec score = load(p);
      if (params.soft_cap > 0) score = apply_soft_cap(params, score);
      if (params.slopes != nullptr) {
        score += block.slope[j] * __builtin_convertvector(index - block.position[j], Vec);
      }
      if (params.distances != nullptr) {
        float added[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          added[lane] = at_distance(params, block.distances[j * kLanes + lane],
                                    block.position[j][lane] - (key + m));
        }
        score += load(added);
      }
      const IntVec seen = (index >= block.first_key[j]) & (index <= block.last_key[j]);
      score = seen ? score : splat(-__builtin_inff());
      block.block_max[j] = max(score, block.block_max[j]);
      store(p, score);
    }
  }
}

template <int kVectors, bool kPairs>
bool needs_adjustment(const RowBlock<kVectors, kPairs>& block, KeyRange keys) {
  const AttentionParams& params = block.params;
  return keys.begin < block.seen_by_all.begin || keys.end > block.seen_by_all.end ||
         params.soft_cap > 0 || params.slopes != nullptr || params.distances != nullptr;
}

// Scores of keys [key, key + kCount); `k` starts at the first.
// Not inlined, so that each tile's accumulators have the registers to themselves: where they spill,
// the product loop loses half of its speed (in a first version 30 instead of 55 GFLOP/s).
template <int kCount, int kVectors, bool kPairs>
__attribute__((noinline)) void score_tile(RowBlock<kVectors, kPairs>& block, const std::byte* k,
                                          int64_t stride, const float* scales, int64_t key,
                                          float* scores) {
  Vec acc[kCount][kVectors];
  const int64_t dim = block.params.head_dim;
  const int64_t depth = kPairs ? ceil_div(dim, 2) : dim;
  multiply<kPairs>(k, stride, sizeof(float), block.queries, depth, acc);
  if (kPairs && scales != nullptr) {
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      DOUBLEWEAVE_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[m][j] *= splat(scales[m]);
    }
  }
  DOUBLEWEAVE_UNROLL
  for (int m = 0; m < kCount; ++m) {
    DOUBLEWEAVE_UNROLL
    for (int j = 0; j < kVectors; ++j) store(scores + (m * kVectors + j) * kLanes, acc[m][j]);
  }
  if (needs_adjustment(block, {key, key + kCount})) {
    return adjust_scores(block, key, kCount, scores);
  }
  DOUBLEWEAVE_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    Vec largest = block.block_max[j];
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) largest = max(acc[m][j], largest);
    block.block_max[j] = largest;
  }
}

// Keys or values as the product loop reads them.
struct Operand {
  const std::byte* data;
  int64_t stride;       // bytes from row to row
  const float* scales;  // or null
};

// The first `count` keys or values: where they lie, or unpacked. Pairs of values have a row for two
// keys.
template <bool kPairs, bool kAreValues>
Operand operand(CacheFormat format, const HeadRows& rows, int64_t count, float* unpacked,
                float* scales) {
  const auto* data = reinterpret_cast<const std::byte*>(unpacked);
  if constexpr (!kPairs) {
    if (format == CacheFormat::kFloat32) return {rows.data, rows.stride, nullptr};
    unpack(format, rows, count, unpacked);
    return {data, rows.dim * 4, nullptr};
  } else {
    const bool has_scales = format == CacheFormat::kInt8;
    if (has_scales) gather_scales(rows, count, scales);
    const float* found = has_scales ? scales : nullptr;
    if constexpr (kAreValues) {
      pair_values(format, rows, count, unpacked);
      return {data, rows.dim * 4, found};
    } else {
      if (!has_scales && rows.dim % 2 == 0) return {rows.data, rows.stride, nullptr};
      pair_keys(format, rows, count, unpacked);
      return {data, ceil_div(rows.dim, 2) * 4, found};
    }
  }
}

template <int kVectors, bool kPairs>
void score_keys(RowBlock<kVectors, kPairs>& block, const Operand& k, KeyRange keys) {
  DOUBLEWEAVE_UNROLL
  for (int j = 0; j < kVectors; ++j) block.block_max[j] = block.running_max[j];
  int64_t key = keys.begin;
  float* scores = block.weights;
  const std::byte* data = k.data;
  const float* scales = k.scales;
  for (; key + kTile <= keys.end; key += kTile, scores += kTile * block.kRows) {
    score_tile<kTile>(block, data, k.stride, scales, key, scores);
    data += kTile * k.stride;
    if (scales != nullptr) scales += kTile;
  }
  for (; key < keys.end; ++key, scores += block.kRows) {
    score_tile<1>(block, data, k.stride, scales, key, scores);
    data += k.stride;
    if (scales != nullptr) ++scales;
  }
}

// Turns scores into weights relative to the largest score so far; of pairs, multiplied by the
// scales of their values.
template <int kVectors, bool kPairs>
__attribute__((noinline)) void exponentiate(RowBlock<kVectors, kPairs>& block, int64_t num_keys,
                                            const float* scales) {
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
  if constexpr (kPairs) {
    for (int64_t i = 0; i < num_keys; i += 2) {
      const bool is_alone = i + 1 == num_keys;
      DOUBLEWEAVE_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const float* p = weights + (i * kVectors + j) * kLanes;
        Vec first = short_exp2(load(p) - largest[j]);
        Vec second = is_alone ? Vec{} : short_exp2(load(p + kVectors * kLanes) - largest[j]);
        sum[j] += first + second;
        if (scales != nullptr) {
          first *= splat(scales[i]);
          second *= splat(is_alone ? 0.0f : scales[i + 1]);
        }
        store(weights + (i / 2 * kVectors + j) * kLanes, paired_weights(first, second));
      }
    }
  } else {
    for (int64_t i = 0; i < num_keys; ++i) {
      DOUBLEWEAVE_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        float* p = weights + (i * kVectors + j) * kLanes;
        const Vec weight = exp2(load(p) - largest[j]);
        sum[j] += weight;
        store(p, weight);
      }
    }
  }
  DOUBLEWEAVE_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    block.total[j] = block.total[j] * block.correction[j] + sum[j];
  }
}

// Adds weights * v to columns [column, column + kCount) of the output.
template <int kCount, int kVectors, bool kPairs>
__attribute__((noinline)) void value_tile(RowBlock<kVectors, kPairs>& block, const Operand& v,
                                          int64_t num_keys, int64_t column) {
  Vec acc[kCount][kVectors];
  const int64_t depth = kPairs ? ceil_div(num_keys, 2) : num_keys;
  const std::byte* data = v.data + column * static_cast<int64_t>(sizeof(float));
  multiply<kPairs>(data, sizeof(float), v.stride, block.weights, depth, acc);
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

template <int kVectors, bool kPairs>
void add_values(RowBlock<kVectors, kPairs>& block, const Operand& v, int64_t num_keys) {
  const int64_t dim = block.params.value_dim;
  int64_t column = 0;
  for (; column + kTile <= dim; column += kTile) value_tile<kTile>(block, v, num_keys, column);
  for (; column < dim; ++column) value_tile<1>(block, v, num_keys, column);
}

// Where the rows in the lanes of vector j start in q or out.
template <int kVectors, bool kPairs>
void lane_offsets(const RowBlock<kVectors, kPairs>& block, int j, int64_t dim,
                  int64_t (&offsets)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    offsets[i] = row_offset(block.params, block.kv_head, block.rows[j * kLanes + i], dim);
  }
}

template <int kVectors, bool kPairs>
__attribute__((noinline)) void load_queries(RowBlock<kVectors, kPairs>& block, const float* q) {
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
      constexpr int kStep = kPairs ? 2 : 1;  // what is past the last dim is zero
      float* p = block.queries + column / kStep * block.kRows + j * kLanes;
      DOUBLEWEAVE_UNROLL
      for (int i = 0; i < kLanes; i += kStep) {
        const Vec x = square[i] * factor;
        store(p + i / kStep * block.kRows, kPairs ? paired(x, square[i + kStep - 1] * factor) : x);
      }
    }
  }
}

template <int kVectors, bool kPairs>
__attribute__((noinline)) void store_output(const RowBlock<kVectors, kPairs>& block, float* out) {
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

template <int kVectors, bool kPairs>
void set_rows(RowBlock<kVectors, kPairs>& block, int64_t first_row, int64_t num_rows) {
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

template <int kVectors, bool kPairs>
void run_row_block(const AttentionParams& params, const AttentionInputs& inputs, int64_t kv_head,
                   int64_t first_row, int64_t num_rows) {
  constexpr int kRows = kVectors * kLanes;
  RowBlock<kVectors, kPairs> block{.params = params, .kv_head = kv_head};
  block.queries = inputs.scratch;
  block.weights = block.queries + round_up(params.head_dim, kLanes) * kRows;
  block.output = block.weights + kKeyBlock * kRows;
  block.keys = block.output + round_up(params.value_dim, kLanes) * kRows;
  block.values = block.keys + round_up(params.head_dim, kLanes) * kKeyBlock;
  block.scales = block.values + round_up(params.value_dim, kLanes) * kKeyBlock;
  set_rows(block, first_row, num_rows);
  load_queries(block, inputs.q);
  for (int64_t i = 0; i < params.value_dim * kVectors; ++i) {
    store(block.output + i * kLanes, Vec{});
  }

  const HeadRows k = rows_of_head(params, inputs.k, kv_head, params.head_dim);
  const HeadRows v = rows_of_head(params, inputs.v, kv_head, params.value_dim);
  const KeyRange seen = block.seen_by_some;
  // Whole tiles of masked keys are cheaper than single keys.
  const int64_t end = min(params.num_keys, seen.begin + round_up(seen.end - seen.begin, kTile));
  for (int64_t key = seen.begin; key < end; key += kKeyBlock) {
    const KeyRange keys = {key, min(end, key + kKeyBlock)};
    const int64_t num_keys = keys.end - keys.begin;
    score_keys(block,
               operand<kPairs, false>(params.format, rows_from(k, key), num_keys, block.keys,
                                      block.scales),
               keys);
    const Operand values = operand<kPairs, true>(params.format, rows_from(v, key), num_keys,
                                                 block.values, block.scales + kKeyBlock);
    exponentiate(block, num_keys, values.scales);
    add_values(block, values, num_keys);
  }
  store_output(block, inputs.out);
}

int64_t num_row_vectors(const AttentionParams& params) {
  return ceil_div(params.num_queries * group_size(params), kLanes);
}

int64_t num_row_blocks(const AttentionParams& params) {
  return ceil_div(num_row_vectors(params), kMaxVectors);
}

int64_t num_scratch_floats(const AttentionParams& params) {
  if (decodes(params)) return decode_scratch_floats(params);
  const int64_t dims = round_up(params.head_dim, kLanes) + round_up(params.value_dim, kLanes);
  const int64_t unpacked = params.format == CacheFormat::kFloat32 ? 0 : (dims + 2) * kKeyBlock;
  return (dims + kKeyBlock) * kMaxVectors * kLanes + unpacked;
}

template <bool kPairs>
void run_prompt(const AttentionParams& params, const AttentionInputs& inputs, int64_t kv_head,
                int64_t row_block) {
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
      return run_row_block<1, kPairs>(params, inputs, kv_head, first_row, num_rows);
    case 2:
      return run_row_block<2, kPairs>(params, inputs, kv_head, first_row, num_rows);
    default:
      return run_row_block<3, kPairs>(params, inputs, kv_head, first_row, num_rows);
  }
}

void run(const AttentionParams& params, const AttentionInputs& inputs, int64_t kv_head,
         int64_t row_block) {
  if constexpr (kHasPairs) {
    if (rounds_to_bfloat16(params.format)) {
      return run_prompt<true>(params, inputs, kv_head, row_block);
    }
  }
  run_prompt<false>(params, inputs, kv_head, row_block);
}

}  // namespace

extern const AttentionKernel kKernel = {
    DOUBLEWEAVE_ISA, num_scratch_floats, num_row_blocks, run, num_key_ranges,
    decode,          rounds_to_bfloat16};

}  // namespace DOUBLEWEAVE_ISA_NAMESPACE
}  // namespace doubleweave

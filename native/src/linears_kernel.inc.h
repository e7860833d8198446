// The kernel of linears, compiled once for each instruction set: a file defines
// DOUBLEWEAVE_ISA_NAMESPACE, DOUBLEWEAVE_VECTOR_BYTES and DOUBLEWEAVE_VECTOR_REGISTERS, and one of
// DOUBLEWEAVE_DOT_VNNI, DOUBLEWEAVE_DOT_MADD, DOUBLEWEAVE_DOT_NEON (or none), before it includes
// this one.
#include <utility>

#include "linears_kernel.h"

#if defined(DOUBLEWEAVE_DOT_VNNI) || defined(DOUBLEWEAVE_DOT_MADD)
#include <immintrin.h>
#elif defined(DOUBLEWEAVE_DOT_NEON)
#include <arm_neon.h>
#endif

namespace doubleweave {
namespace DOUBLEWEAVE_ISA_NAMESPACE {
namespace {

#include "attention_vector.inc.h"

typedef int32_t MemoryIntVec
    __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES), aligned(1), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 2)));
typedef uint16_t MemoryHalfVec
    __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint8_t ByteVec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 4)));
typedef uint8_t MemoryByteVec
    __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 4), aligned(1), may_alias));
typedef int32_t MemoryInt __attribute__((aligned(1), may_alias));
typedef float MemoryFloat __attribute__((aligned(1), may_alias));
typedef int16_t ShortVec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES)));
typedef int8_t PairVec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 2)));
typedef int8_t MemoryPairVec
    __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 2), aligned(1), may_alias));

constexpr int kVectors = kLinearBlock / kLanes;  // of one block
constexpr int64_t kBlockBytes = 64;              // of four input features (of eight, kInt4)
constexpr int kNoQuads = 0x0f0f0f0f;
#if defined(DOUBLEWEAVE_DOT_NEON)
constexpr int32_t kAddedToInt8 = 0;  // products of signed bytes: what the file adds is taken off
#else
constexpr int32_t kAddedToInt8 = 128;
#endif
constexpr int32_t kAddedToInt4 = 8;
// One row's product reads each weight once. Processors fetch ahead to the end of a page at most.
constexpr int64_t kAheadBytes = 4096;

#if defined(DOUBLEWEAVE_DOT_MADD)
constexpr int64_t kQuadBytes = 8;  // four numbers of a row as int16: 0, 2, 1, 3
#else
constexpr int64_t kQuadBytes = 4;  // as int8
#endif

// The rows that are multiplied together, and the blocks: their sums fill the registers but for
// some. Of weights in groups there are two sums, of a group and of all.
constexpr int kFreeRegisters = DOUBLEWEAVE_VECTOR_REGISTERS >= 32 ? 8 : 4;
constexpr int kSumRegisters = DOUBLEWEAVE_VECTOR_REGISTERS - kFreeRegisters;
constexpr int kBlocks = kSumRegisters / kVectors >= 24 ? 2 : 1;
constexpr int kMostRows = kSumRegisters / kVectors / kBlocks;
constexpr int kMostRowsInt4 = kMostRows / 2 > 0 ? kMostRows / 2 : 1;
// kInt8 multiplies by what it reads: fewer registers are left free.
constexpr int kMostRowsInt8 = (DOUBLEWEAVE_VECTOR_REGISTERS - 4) / (2 * kVectors * kBlocks) > 0
                                  ? (DOUBLEWEAVE_VECTOR_REGISTERS - 4) / (2 * kVectors * kBlocks)
                                  : 1;
// One row waits for each sum before it adds to it again, unless there are others.
constexpr int kBlocksOfOneRow = kVectors == 1 ? 4 : kVectors == 2 ? 2 : 1;

DOUBLEWEAVE_INLINE IntVec load_ints(const uint8_t* p) {
  return *reinterpret_cast<const MemoryIntVec*>(p);
}

DOUBLEWEAVE_INLINE int32_t load_int(const uint8_t* p) {
  return *reinterpret_cast<const MemoryInt*>(p);
}

DOUBLEWEAVE_INLINE float load_float(const uint8_t* p) {
  return *reinterpret_cast<const MemoryFloat*>(p);
}

DOUBLEWEAVE_INLINE int64_t linear_pairs(int64_t in_features) {
  return (in_features + 2 * kLinearGroup - 1) / (2 * kLinearGroup);
}

DOUBLEWEAVE_INLINE float std_abs(float x) { return x < 0 ? -x : x; }

// What `dot` multiplies of the bytes of kInt8.
DOUBLEWEAVE_INLINE IntVec as_factors(IntVec bytes) {
#if defined(DOUBLEWEAVE_DOT_NEON)
  return bytes ^ splat_int(static_cast<int32_t>(0x80808080));
#else
  return bytes;
#endif
}

// Adds to each lane the products of its four unsigned bytes with four numbers of a row. Bytes of
// DOUBLEWEAVE_DOT_NEON are signed, which is the same below 128.
DOUBLEWEAVE_INLINE IntVec dot(IntVec sum, IntVec weights, const uint8_t* row) {
#if defined(DOUBLEWEAVE_DOT_VNNI) && DOUBLEWEAVE_VECTOR_BYTES == 64
  return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                      reinterpret_cast<__m512i>(weights),
                                                      _mm512_set1_epi32(load_int(row))));
#elif defined(DOUBLEWEAVE_DOT_VNNI)
  return reinterpret_cast<IntVec>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum),
                                                          reinterpret_cast<__m256i>(weights),
                                                          _mm256_set1_epi32(load_int(row))));
#elif defined(DOUBLEWEAVE_DOT_MADD)
  const IntVec even = weights & splat_int(0x00ff00ff);
  const IntVec odd = (weights >> 8) & splat_int(0x00ff00ff);
#if DOUBLEWEAVE_VECTOR_BYTES == 32
  return sum +
         reinterpret_cast<IntVec>(
             _mm256_madd_epi16(reinterpret_cast<__m256i>(even), _mm256_set1_epi32(load_int(row)))) +
         reinterpret_cast<IntVec>(_mm256_madd_epi16(reinterpret_cast<__m256i>(odd),
                                                    _mm256_set1_epi32(load_int(row + 4))));
#else
  return sum +
         reinterpret_cast<IntVec>(
             _mm_madd_epi16(reinterpret_cast<__m128i>(even), _mm_set1_epi32(load_int(row)))) +
         reinterpret_cast<IntVec>(
             _mm_madd_epi16(reinterpret_cast<__m128i>(odd), _mm_set1_epi32(load_int(row + 4))));
#endif
#elif defined(DOUBLEWEAVE_DOT_NEON)
  return reinterpret_cast<IntVec>(vdotq_s32(reinterpret_cast<int32x4_t>(sum),
                                            reinterpret_cast<int8x16_t>(weights),
                                            reinterpret_cast<int8x16_t>(splat_int(load_int(row)))));
#else
  DOUBLEWEAVE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const IntVec byte = (weights >> (8 * i)) & splat_int(0xff);
    sum += byte * splat_int(static_cast<int8_t>(row[i]));
  }
  return sum;
#endif
}

DOUBLEWEAVE_INLINE Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }

DOUBLEWEAVE_INLINE Vec load_bfloat16(const uint8_t* p) {
  const HalfVec x = *reinterpret_cast<const MemoryHalfVec*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(x, IntVec) << 16);
}

// Two bytes a lane, as numbers of 16 bits.
DOUBLEWEAVE_INLINE IntVec load_pairs(const int8_t* p) {
  const PairVec pairs = *reinterpret_cast<const MemoryPairVec*>(p);
  return reinterpret_cast<IntVec>(__builtin_convertvector(pairs, ShortVec));
}

// Adds to each lane the products of its two numbers of 16 bits with two.
DOUBLEWEAVE_INLINE IntVec dot_pairs(IntVec sum, IntVec pairs, const int16_t* two) {
  [[maybe_unused]] const IntVec both = splat_int(load_int(reinterpret_cast<const uint8_t*>(two)));
#if defined(DOUBLEWEAVE_DOT_VNNI) && DOUBLEWEAVE_VECTOR_BYTES == 64
  return reinterpret_cast<IntVec>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum),
                                                      reinterpret_cast<__m512i>(pairs),
                                                      reinterpret_cast<__m512i>(both)));
#elif defined(DOUBLEWEAVE_DOT_VNNI)
  return reinterpret_cast<IntVec>(_mm256_dpwssd_avx_epi32(reinterpret_cast<__m256i>(sum),
                                                          reinterpret_cast<__m256i>(pairs),
                                                          reinterpret_cast<__m256i>(both)));
#elif defined(DOUBLEWEAVE_DOT_MADD) && DOUBLEWEAVE_VECTOR_BYTES == 32
  return sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(reinterpret_cast<__m256i>(pairs),
                                                          reinterpret_cast<__m256i>(both)));
#elif defined(DOUBLEWEAVE_DOT_MADD)
  return sum + reinterpret_cast<IntVec>(_mm_madd_epi16(reinterpret_cast<__m128i>(pairs),
                                                       reinterpret_cast<__m128i>(both)));
#else
  return sum + (pairs << 16 >> 16) * splat_int(two[0]) + (pairs >> 16) * splat_int(two[1]);
#endif
}

// The lanes moved by so many places, round the end.
template <int kBy, typename V, size_t... kLane>
DOUBLEWEAVE_INLINE V rotated_lanes(V x, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(x, x, (kLane + kBy) % kLanes...);
}

// All lanes by halves: one after the other they would wait for each other.
template <int kBy = kLanes / 2>
DOUBLEWEAVE_INLINE int32_t total_of(IntVec x) {
  x += rotated_lanes<kBy>(x, std::make_index_sequence<kLanes>());
  if constexpr (kBy > 1) {
    return total_of<kBy / 2>(x);
  } else {
    return x[0];
  }
}

template <int kBy = kLanes / 2>
DOUBLEWEAVE_INLINE float largest_of(Vec x) {
  x = max(x, rotated_lanes<kBy>(x, std::make_index_sequence<kLanes>()));
  if constexpr (kBy > 1) {
    return largest_of<kBy / 2>(x);
  } else {
    return x[0];
  }
}

// Writes numbers of a row in the form that `dot` reads.
DOUBLEWEAVE_INLINE void put_numbers(uint8_t* to, IntVec numbers) {
#if defined(DOUBLEWEAVE_DOT_MADD)
  constexpr int kPlace[4] = {0, 2, 1, 3};
  for (int i = 0; i < kLanes; ++i) {
    const auto wide = static_cast<uint16_t>(numbers[i]);
    uint8_t* place = to + i / 4 * kQuadBytes + 2 * kPlace[i % 4];
    place[0] = static_cast<uint8_t>(wide);
    place[1] = static_cast<uint8_t>(wide >> 8);
  }
#else
  *reinterpret_cast<MemoryByteVec*>(to) = __builtin_convertvector(numbers, ByteVec);
#endif
}

// Numbers of a row from `k` on, of which there are `left`; none behind them.
DOUBLEWEAVE_INLINE Vec load_left(const float* x, int64_t k, int64_t left) {
  return left >= kLanes ? load(x + k) : left > 0 ? load_up_to(x + k, left) : Vec{};
}

// x times the sigmoid of z.
DOUBLEWEAVE_INLINE Vec times_sigmoid(Vec x, Vec z) {
  const Vec exponent = z * splat(-0x1.715476p0f);  // of 2
  return x / (splat(1.0f) + exp2(exponent < splat(126.0f) ? exponent : splat(126.0f)));
}

template <RowKind kKind>
DOUBLEWEAVE_INLINE Vec computed(const RowSource& source, float factor, int64_t k, int64_t left) {
  const Vec x = load_left(source.x, k, left);
  if constexpr (kKind == RowKind::kPlain) return x;
  const Vec other = load_left(source.other, k, left);
  if constexpr (kKind == RowKind::kNormed) return x * splat(factor) * other;
  if constexpr (kKind == RowKind::kSilu) return times_sigmoid(x, x) * other;
  // 0.5 * (1 + tanh(y)) is sigmoid(2 * y).
  const Vec cubic = splat(0x1.988454p0f) * x * (splat(1.0f) + splat(0.044715f) * x * x);
  return times_sigmoid(x, cubic) * other;
}

float norm_factor(const RowSource& source, int64_t in_features) {
  Vec sum{};
  for (int64_t k = 0; k < in_features; k += kLanes) {
    const Vec x = load_left(source.x, k, in_features - k);
    sum += x * x;
  }
  const float mean = sum_lanes(sum) / static_cast<float>(in_features);
  return 1.0f / __builtin_sqrtf(mean + source.epsilon);
}

// Groups that are rounded together: what waits for one of them does not hold up the others.
constexpr int kGroupsTogether = 8;
constexpr int kGroupVectors = kInt8Group / kLanes;

// Rounds `count` groups from group `first` on; returns the largest sum of a half, as what it stands
// for.
template <RowKind kKind>
float pack_groups(const RowSource& source, float factor, int64_t in_features, int64_t first,
                  int count, const PackedRow& row, uint8_t* packed, Vec& poison) {
  const float kRound = 0x1.8p23f;
  Vec values[kGroupsTogether][kGroupVectors];
  Vec high[kGroupsTogether];
  float steps[kGroupsTogether];
  float inverses[kGroupsTogether];
  IntVec sums[kGroupsTogether][2];
  for (int i = 0; i < count; ++i) {
    high[i] = Vec{};
    DOUBLEWEAVE_UNROLL
    for (int v = 0; v < kGroupVectors; ++v) {
      const int64_t k = (first + i) * kInt8Group + v * kLanes;
      const Vec value = computed<kKind>(source, factor, k, in_features - k);
      values[i][v] = value;
      high[i] = max(high[i], max(value, -value));
      poison += value - value;
    }
  }
  for (int i = 0; i < count; ++i) {
    const float largest = largest_of(high[i]);
    steps[i] = largest * (1.0f / 127.0f);
    inverses[i] = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
  }
  for (int i = 0; i < count; ++i) {
    sums[i][0] = sums[i][1] = IntVec{};
    DOUBLEWEAVE_UNROLL
    for (int v = 0; v < kGroupVectors; ++v) {
      Vec value = (values[i][v] * splat(inverses[i]) + splat(kRound)) - splat(kRound);
      // The smaller of the two first: a NaN becomes a number, and what it is does not count.
      value = max(splat(-127.0f), value < splat(127.0f) ? value : splat(127.0f));
      const IntVec numbers = __builtin_convertvector(value, IntVec);
      sums[i][2 * v / kGroupVectors] += numbers;
      put_numbers(packed + ((first + i) * kInt8Group + v * kLanes) / 4 * kQuadBytes, numbers);
    }
  }
  auto* scales = reinterpret_cast<float*>(packed + row.scales) + first;
  auto* sums_int8 = reinterpret_cast<int32_t*>(packed + row.sums_int8) + first;
  auto* sums_int4 = reinterpret_cast<int32_t*>(packed + row.sums_int4) + 2 * first;
  float largest_sum = 0;
  for (int i = 0; i < count; ++i) {
    scales[i] = steps[i];
    int32_t total = 0;
    DOUBLEWEAVE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t of_half = total_of(sums[i][half]);
      total += of_half;
      sums_int4[2 * i + half] = -kAddedToInt4 * of_half;
      const float stands_for = static_cast<float>(of_half < 0 ? -of_half : of_half) * steps[i];
      largest_sum = stands_for > largest_sum ? stands_for : largest_sum;
    }
    sums_int8[i] = -kAddedToInt8 * total;
  }
  return largest_sum;
}

template <RowKind kKind>
void pack_row_of(const RowSource& source, int64_t in_features, uint8_t* packed) {
  const float factor = kKind == RowKind::kNormed ? norm_factor(source, in_features) : 0.0f;
  const int64_t num_groups = linear_pairs(in_features);
  const PackedRow row = packed_row(num_groups);
  auto* scales = reinterpret_cast<float*>(packed + row.scales);
  const auto* sums_int4 = reinterpret_cast<const int32_t*>(packed + row.sums_int4);
  float largest_sum = 0;
  Vec poison{};  // NaN where a number is not finite
  for (int64_t g = 0; g < num_groups; g += kGroupsTogether) {
    const int64_t left = num_groups - g;
    const int count = left < kGroupsTogether ? static_cast<int>(left) : kGroupsTogether;
    const float sum =
        pack_groups<kKind>(source, factor, in_features, g, count, row, packed, poison);
    largest_sum = sum > largest_sum ? sum : largest_sum;
  }
  const float poisoned = sum_lanes(poison);
  if (!(poisoned == 0.0f)) {
    for (int64_t g = 0; g < num_groups; ++g) scales[g] += poisoned;
  }
  // Products with as many offsets of 8 bits stay in 32.
  int64_t most = (int64_t{1} << 24) / (2 * num_groups);
  most = most < 32767 ? most : 32767;
  const float sum_step = largest_sum > 0x1p-100f ? largest_sum / static_cast<float>(most) : 1.0f;
  const float inverse = 1.0f / sum_step;
  auto* half_sums = reinterpret_cast<int16_t*>(packed + row.half_sums);
  for (int64_t half = 0; half < 2 * num_groups; ++half) {
    const auto total = static_cast<float>(sums_int4[half] / -kAddedToInt4);
    float steps = total * scales[half / 2] * inverse;
    steps += steps < 0 ? -0.5f : 0.5f;
    // What is not finite is none in the scales already.
    const bool is_in_range = -32768.0f < steps && steps < 32768.0f;
    half_sums[half] = is_in_range ? static_cast<int16_t>(steps) : 0;
  }
  *reinterpret_cast<float*>(packed + row.sum_step) = sum_step;
}

void pack_row(const RowSource& source, int64_t in_features, uint8_t* packed) {
  switch (source.kind) {
    case RowKind::kPlain:
      return pack_row_of<RowKind::kPlain>(source, in_features, packed);
    case RowKind::kSilu:
      return pack_row_of<RowKind::kSilu>(source, in_features, packed);
    case RowKind::kGelu:
      return pack_row_of<RowKind::kGelu>(source, in_features, packed);
    case RowKind::kNormed:
      return pack_row_of<RowKind::kNormed>(source, in_features, packed);
  }
}

// The sums of some rows with some blocks.
template <int kRows, int kColumns>
struct Sums {
  Vec of[kRows][kColumns];
};

template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void multiply_floats(const LinearTile& t, const int32_t* entries, int64_t block,
                                        Sums<kRows, kColumns>& sums) {
  const int64_t block_floats = t.in_features * kLinearBlock;
  const float* weights = reinterpret_cast<const float*>(t.weights) + block * block_floats;
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = t.x + entries[r] / t.num_choices * t.in_features;
  for (int64_t k = 0; k < t.in_features; ++k) {
    Vec w[kColumns];
    DOUBLEWEAVE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      w[c] = load(weights + c / kVectors * block_floats + k * kLinearBlock + c % kVectors * kLanes);
    }
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec value = splat(x[r][k]);
      DOUBLEWEAVE_UNROLL
      for (int c = 0; c < kColumns; ++c) sums.of[r][c] += value * w[c];
    }
  }
}

// Where a block lies among those of its bundle.
struct Bundle {
  int64_t first_block;
  int64_t block;
  int64_t num_blocks;

  // Of its first group, where each of `num_groups` has so many bytes a block.
  int64_t at(int64_t num_groups, int64_t bytes) const {
    return (first_block * num_groups + block) * bytes;
  }
};

DOUBLEWEAVE_INLINE Bundle bundle_of(const LinearTile& t, int64_t block) {
  const int64_t all = (t.out_features + kLinearBlock - 1) / kLinearBlock;
  const int64_t first = block / kLinearBundle * kLinearBundle;
  return {first, block - first, all - first < kLinearBundle ? all - first : kLinearBundle};
}

template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void multiply_int8(const LinearTile& t, const uint8_t* const* rows,
                                      int64_t block, Sums<kRows, kColumns>& sums) {
  const int64_t num_groups = linear_pairs(t.in_features);
  const PackedRow row = packed_row(num_groups);
  constexpr int kQuads = kInt8Group / 4;
  constexpr int64_t kGroupBytes = kQuads * kBlockBytes;
  constexpr int64_t kScaleBytes = kLinearBlock * 2;
  const Bundle bundle = bundle_of(t, block);
  const uint8_t* weights = t.weights + bundle.at(num_groups, kGroupBytes);
  const uint8_t* scales = t.scales + bundle.at(num_groups, kScaleBytes);
  for (int64_t g = 0; g < num_groups; ++g) {
    IntVec sum[kRows][kColumns];
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int32_t first = load_int(rows[r] + row.sums_int8 + g * 4);
      DOUBLEWEAVE_UNROLL
      for (int c = 0; c < kColumns; ++c) sum[r][c] = splat_int(first);
    }
    for (int q = 0; q < kQuads; ++q) {
      IntVec w[kColumns];
      DOUBLEWEAVE_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const uint8_t* from = weights + c / kVectors * kGroupBytes + q * kBlockBytes;
        if (kRows == 1 && c % kVectors == 0) __builtin_prefetch(from + kAheadBytes);
        w[c] = as_factors(load_ints(from + c % kVectors * DOUBLEWEAVE_VECTOR_BYTES));
      }
      DOUBLEWEAVE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* numbers = rows[r] + (g * kQuads + q) * kQuadBytes;
        DOUBLEWEAVE_UNROLL
        for (int c = 0; c < kColumns; ++c) sum[r][c] = dot(sum[r][c], w[c], numbers);
      }
    }
    DOUBLEWEAVE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const Vec scale = load_bfloat16(scales + c * kLanes * 2);
      DOUBLEWEAVE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec step = splat(load_float(rows[r] + row.scales + g * 4));
        sums.of[r][c] += to_float(sum[r][c]) * scale * step;
      }
    }
    weights += bundle.num_blocks * kGroupBytes;
    scales += bundle.num_blocks * kScaleBytes;
  }
}

template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void multiply_int4(const LinearTile& t, const uint8_t* const* rows,
                                      int64_t block, Sums<kRows, kColumns>& sums) {
  const PackedRow row = packed_row(linear_pairs(t.in_features));
  const int64_t num_groups = t.in_features / kLinearGroup;
  constexpr int kPairs = kLinearGroup / 8;
  constexpr int64_t kGroupBytes = kPairs * kBlockBytes;
  constexpr int64_t kScaleBytes = kLinearBlock * 2;
  const Bundle bundle = bundle_of(t, block);
  const uint8_t* weights = t.weights + bundle.at(num_groups, kGroupBytes);
  const uint8_t* scales = t.scales + bundle.at(num_groups, kScaleBytes);
  for (int64_t g = 0; g < num_groups; ++g) {
    if constexpr (kRows == 1) {
      DOUBLEWEAVE_UNROLL
      for (int i = 0; i < kColumns / kVectors * kPairs; ++i) {
        __builtin_prefetch(weights + kAheadBytes + i * kBlockBytes);
      }
      __builtin_prefetch(scales + kAheadBytes / 8);
    }
    IntVec sum[kRows][kColumns];
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int32_t first = load_int(rows[r] + row.sums_int4 + g * 4);
      DOUBLEWEAVE_UNROLL
      for (int c = 0; c < kColumns; ++c) sum[r][c] = splat_int(first);
    }
    DOUBLEWEAVE_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      IntVec low[kColumns];
      IntVec high[kColumns];
      DOUBLEWEAVE_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const IntVec both = load_ints(weights + c / kVectors * kGroupBytes + p * kBlockBytes +
                                      c % kVectors * DOUBLEWEAVE_VECTOR_BYTES);
        low[c] = both & splat_int(kNoQuads);
        high[c] = (both >> 4) & splat_int(kNoQuads);
      }
      DOUBLEWEAVE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* numbers = rows[r] + 2 * (g * kPairs + p) * kQuadBytes;
        DOUBLEWEAVE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          sum[r][c] = dot(dot(sum[r][c], low[c], numbers), high[c], numbers + kQuadBytes);
        }
      }
    }
    DOUBLEWEAVE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const Vec scale = load_bfloat16(scales + c * kLanes * 2);
      DOUBLEWEAVE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec step = splat(load_float(rows[r] + row.scales + g / 2 * 4));
        sums.of[r][c] += to_float(sum[r][c]) * scale * step;
      }
    }
    weights += bundle.num_blocks * kGroupBytes;
    scales += bundle.num_blocks * kScaleBytes;
  }
}

// The sums of groups times what is added to each weight of theirs.
template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void add_offsets(const LinearTile& t, const uint8_t* const* rows, int64_t block,
                                    Sums<kRows, kColumns>& sums) {
  const int64_t num_pairs = linear_pairs(t.in_features);
  const PackedRow row = packed_row(num_pairs);
  constexpr int64_t kOffsetBytes = kLinearBlock * 2;
  const Bundle bundle = bundle_of(t, block);
  const int8_t* offsets = t.offsets + bundle.at(num_pairs, kOffsetBytes);
  IntVec sum[kRows][kColumns] = {};
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    IntVec both[kColumns];
    DOUBLEWEAVE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      both[c] = load_pairs(offsets + c * kLanes * 2);
    }
    offsets += bundle.num_blocks * kOffsetBytes;
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto* two = reinterpret_cast<const int16_t*>(rows[r] + row.half_sums) + 2 * pair;
      DOUBLEWEAVE_UNROLL
      for (int c = 0; c < kColumns; ++c) sum[r][c] = dot_pairs(sum[r][c], both[c], two);
    }
  }
  DOUBLEWEAVE_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec scale = load(t.offset_scales + block * kLinearBlock + c * kLanes);
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums.of[r][c] += to_float(sum[r][c]) * scale * splat(load_float(rows[r] + row.sum_step));
    }
  }
}

template <LinearFormat kFormat, int kRows, int kNumBlocks>
__attribute__((noinline)) void multiply(const LinearTile& t, int64_t first_row, int64_t block) {
  constexpr int kColumns = kNumBlocks * kVectors;
  const int32_t* entries = t.entries + first_row;
  Sums<kRows, kColumns> sums{};
  if constexpr (kFormat == LinearFormat::kFloat32) {
    multiply_floats(t, entries, block, sums);
  } else {
    const uint8_t* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = t.packed + entries[r] / t.num_choices * t.row_bytes;
    if constexpr (kFormat == LinearFormat::kInt8) {
      multiply_int8(t, rows, block, sums);
    } else {
      multiply_int4(t, rows, block, sums);
      if (t.offsets != nullptr) add_offsets(t, rows, block, sums);
    }
  }
  const int64_t first = block * kLinearBlock;
  for (int c = 0; c < kColumns; ++c) {
    const int64_t n = first + c * kLanes;
    if (n >= t.out_features) break;
    const int64_t left = t.out_features - n;
    const Vec bias = t.bias == nullptr ? Vec{} : load_up_to(t.bias + n, left);
    for (int r = 0; r < kRows; ++r) {
      store_up_to(t.out + entries[r] * t.out_features + n, sums.of[r][c] + bias, left);
    }
  }
}

// Asks for the lines of the next tile's weights, a few between products, so that memory and
// arithmetic work at the same time.
class Ahead {
 public:
  Ahead(const LinearTile& t, int64_t num_steps)
      : at_(t.next), end_(t.next + t.next_bytes), step_(t.next_bytes / num_steps + kLineBytes) {}

  void step() {
    for (const uint8_t* to = at_ + step_; at_ < to && at_ < end_; at_ += kLineBytes) {
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const uint8_t* at_;
  const uint8_t* end_;
  int64_t step_;
};

template <LinearFormat kFormat, int kRows>
void multiply_rows(const LinearTile& t, int64_t first_row, int64_t num_rows, Ahead& ahead) {
  if (num_rows == kRows) {
    constexpr int kTogether = kRows == 1 ? kBlocksOfOneRow : kBlocks;
    int64_t block = t.first_block;
    for (; block + kTogether <= t.end_block; block += kTogether) {
      multiply<kFormat, kRows, kTogether>(t, first_row, block);
      ahead.step();
    }
    for (; block < t.end_block; ++block) multiply<kFormat, kRows, 1>(t, first_row, block);
  } else if constexpr (kRows > 1) {
    multiply_rows<kFormat, kRows - 1>(t, first_row, num_rows, ahead);
  }
}

template <LinearFormat kFormat, int kMost>
void run_format(const LinearTile& t) {
  // Some rows stay in the nearest cache while the blocks go by, which the next one holds. As many
  // each time: a last few would use the registers badly.
  const int64_t num_parts = (t.num_rows + kMost - 1) / kMost;
  Ahead ahead(t, num_parts * ((t.end_block - t.first_block + kBlocks - 1) / kBlocks));
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t first = part * t.num_rows / num_parts;
    const int64_t end = (part + 1) * t.num_rows / num_parts;
    multiply_rows<kFormat, kMost>(t, first, end - first, ahead);
  }
}

void run(const LinearTile& t) {
  switch (t.format) {
    case LinearFormat::kFloat32:
      return run_format<LinearFormat::kFloat32, kMostRows>(t);
    case LinearFormat::kInt8:
      return run_format<LinearFormat::kInt8, kMostRowsInt8>(t);
    case LinearFormat::kInt4:
      return run_format<LinearFormat::kInt4, kMostRowsInt4>(t);
  }
}

}  // namespace

const LinearKernel kKernel = {DOUBLEWEAVE_ISA_NAME, pack_row, run};

}  // namespace DOUBLEWEAVE_ISA_NAMESPACE
}  // namespace doubleweave

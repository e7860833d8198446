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
constexpr int kMostRowsInt8 = (DOUBLEWEAVE_VECTOR_REGISTERS - 4) / (2 * kVectors * kBlocks);
static_assert(kMostRowsInt8 > 0);
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

#include "linears_rows.inc.h"

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

// Begins the sums of a group: `at` is where each packed row has what they begin with.
template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void begin_group(IntVec (&sum)[kRows][kColumns], const uint8_t* const* rows,
                                    int64_t at) {
  DOUBLEWEAVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int32_t first = load_int(rows[r] + at);
    DOUBLEWEAVE_UNROLL
    for (int c = 0; c < kColumns; ++c) sum[r][c] = splat_int(first);
  }
}

// Adds what the sums of a group stand for: `at` is where each packed row has the step of its grid.
template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void end_group(const IntVec (&sum)[kRows][kColumns], const uint8_t* scales,
                                  const uint8_t* const* rows, int64_t at,
                                  Sums<kRows, kColumns>& sums) {
  DOUBLEWEAVE_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec scale = load_bfloat16(scales + c * kLanes * 2);
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums.of[r][c] += to_float(sum[r][c]) * scale * splat(load_float(rows[r] + at));
    }
  }
}

template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void multiply_int8(const LinearTile& t, const uint8_t* const* rows,
                                      int64_t block, Sums<kRows, kColumns>& sums) {
  const int64_t num_groups = linear_group_pairs(t.in_features);
  const PackedRow row = packed_row(num_groups);
  constexpr int kQuads = kInt8Group / 4;
  constexpr int64_t kGroupBytes = kQuads * kBlockBytes;
  constexpr int64_t kScaleBytes = kLinearBlock * 2;
  const Bundle bundle = bundle_of(t, block);
  const uint8_t* weights = t.weights + bundle.at(num_groups, kGroupBytes);
  const uint8_t* scales = t.scales + bundle.at(num_groups, kScaleBytes);
  for (int64_t g = 0; g < num_groups; ++g) {
    IntVec sum[kRows][kColumns];
    begin_group(sum, rows, row.sums_int8 + g * 4);
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
    end_group(sum, scales, rows, row.scales + g * 4, sums);
    weights += bundle.num_blocks * kGroupBytes;
    scales += bundle.num_blocks * kScaleBytes;
  }
}

template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void multiply_int4(const LinearTile& t, const uint8_t* const* rows,
                                      int64_t block, Sums<kRows, kColumns>& sums) {
  const PackedRow row = packed_row(linear_group_pairs(t.in_features));
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
    begin_group(sum, rows, row.sums_int4 + g * 4);
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
    end_group(sum, scales, rows, row.scales + g / 2 * 4, sums);
    weights += bundle.num_blocks * kGroupBytes;
    scales += bundle.num_blocks * kScaleBytes;
  }
}

// The sums of groups times what is added to each weight of theirs.
template <int kRows, int kColumns>
DOUBLEWEAVE_INLINE void add_offsets(const LinearTile& t, const uint8_t* const* rows, int64_t block,
                                    Sums<kRows, kColumns>& sums) {
  const int64_t num_pairs = linear_group_pairs(t.in_features);
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

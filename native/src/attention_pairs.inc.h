// Products of bfloat16 in pairs, with sums in float32 (AVX-512 BF16's VDPBF16PS, Arm's BFDOT):
// twice as many products as float32 has, where the cache keeps no more digits. Included once in
// each compilation of the attention kernel; without DOUBLEWEAVE_BF16_PAIRS nothing calls it.
//
//   pair: two neighbours along the sum, the first in the low half of 32 bits.
//
// Keys of kBfloat16 are pairs where they lie. Whole numbers up to 127 are exact in bfloat16, so
// those of kInt8 only widen, and scores and weights are multiplied by their scales in float32.
// Values are paired across two keys, which costs one pass over a block of them for each row block.

// sum + the products of the two pairs in each lane. Only called where it is there.
DOUBLEWEAVE_INLINE Vec add_pairs(Vec sum, Vec a, Vec b) {
#if defined(DOUBLEWEAVE_BF16_PAIRS) && defined(__x86_64__)
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#elif defined(DOUBLEWEAVE_BF16_PAIRS)
  return vbfdotq_f32(sum, reinterpret_cast<bfloat16x8_t>(a), reinterpret_cast<bfloat16x8_t>(b));
#else
  return sum + a * b;
#endif
}

// Two vectors as pairs, rounded to the nearest; of a NaN one remains.
DOUBLEWEAVE_INLINE Vec paired(Vec first, Vec second) {
  const UintVec kHalf = UintVec{} + 0x8000u;
  const UintVec kNan = UintVec{} + 0x7fc00000u;
  const UintVec low = first == first ? reinterpret_cast<UintVec>(first) + kHalf : kNan;
  const UintVec high = second == second ? reinterpret_cast<UintVec>(second) + kHalf : kNan;
  return reinterpret_cast<Vec>((low >> 16) | (high & 0xffff0000u));
}

// The same for weights, which are not negative: a NaN among them is in their total as well.
DOUBLEWEAVE_INLINE Vec paired_weights(Vec first, Vec second) {
#if defined(DOUBLEWEAVE_BF16_PAIRS) && defined(__x86_64__)
  // Two instructions in place of five: of 48 rows, a fiftieth of a call's time.
  const IntVec kTurns = {0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005,
                         0x00160006, 0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b,
                         0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f};
  const __m512bh both =
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  return reinterpret_cast<Vec>(
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kTurns), reinterpret_cast<__m512i>(both)));
#else
  const UintVec low = reinterpret_cast<UintVec>(first) + 0x8000u;
  const UintVec high = reinterpret_cast<UintVec>(second) + 0x8000u;
  return reinterpret_cast<Vec>((low >> 16) | (high & 0xffff0000u));
#endif
}

// exp2 to a relative 8e-5, a twentieth of what bfloat16 rounds weights by: the minimax polynomial
// of degree 3 (fitted as exp2's).
DOUBLEWEAVE_INLINE Vec short_exp2(Vec x) {
  const Vec kRound = splat(0x1.8p23f + 127.0f);
  x = max(splat(-127.0f), x);
  const Vec biased = x + kRound;
  const Vec f = x - (biased - kRound);
  Vec p = f * splat(0x1.c3f798p-5f) + splat(0x1.f0de3cp-3f);
  p = p * f + splat(0x1.62f31ap-1f);
  p = p * f + splat(0x1.fff690p-1f);
  return p * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(biased) << 23);
}

// kLanes numbers as the bits of bfloat16, in the low half of each lane.
template <typename Format>
DOUBLEWEAVE_INLINE UintVec bfloat16_bits(const std::byte* p) {
  if constexpr (Format::kHasScale) return reinterpret_cast<UintVec>(Format::load(p)) >> 16;
  return widened(p);
}

template <typename Format>
uint32_t bfloat16_bits_of_one(const std::byte* p) {
  return bfloat16_bits<Format>(Alone<Format>(p).bytes)[0];
}

// Values of `count` keys as pairs of keys [ceil(count / 2), dim]; the last one alone has zeros.
template <typename Format>
void pair_values_as(const HeadRows& v, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 2, out += v.dim) {
    const std::byte* first = v.data + i * v.stride;
    const bool is_alone = i + 1 == count;
    const std::byte* second = is_alone ? first : first + v.stride;
    const uint32_t kept = is_alone ? 0 : 0xffff0000u;
    int64_t column = 0;
    for (; column + kLanes <= v.dim; column += kLanes) {
      const int64_t at = column * Format::kBytes;
      const UintVec high = (bfloat16_bits<Format>(second + at) << 16) & kept;
      store(out + column, reinterpret_cast<Vec>(bfloat16_bits<Format>(first + at) | high));
    }
    for (; column < v.dim; ++column) {
      const int64_t at = column * Format::kBytes;
      const uint32_t high = (bfloat16_bits_of_one<Format>(second + at) << 16) & kept;
      reinterpret_cast<MemoryInt*>(out)[column] =
          static_cast<int32_t>(bfloat16_bits_of_one<Format>(first + at) | high);
    }
  }
}

[[maybe_unused]] __attribute__((noinline)) void pair_values(CacheFormat format, const HeadRows& v,
                                                            int64_t count, float* out) {
  if (format == CacheFormat::kInt8) return pair_values_as<Int8>(v, count, out);
  return pair_values_as<Bfloat16>(v, count, out);
}

DOUBLEWEAVE_INLINE void narrow(UintVec bits, MemoryHalf* to) {
#if DOUBLEWEAVE_VECTOR_BYTES == 64
  const __m256i halves = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits));
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to), halves);
#else
  *reinterpret_cast<MemoryHalfVec*>(to) = __builtin_convertvector(bits, HalfVec);
#endif
}

// Keys as pairs [count, ceil(dim / 2)], where they are not pairs already.
template <typename Format>
void pair_keys_as(const HeadRows& k, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const std::byte* p = k.data + i * k.stride;
    auto* to = reinterpret_cast<MemoryHalf*>(out + i * ceil_div(k.dim, 2));
    int64_t column = 0;
    for (; column + kLanes <= k.dim; column += kLanes) {
      const UintVec bits = bfloat16_bits<Format>(p + column * Format::kBytes);
      narrow(bits, to + column);
    }
    for (; column < k.dim; ++column) {
      to[column] = static_cast<uint16_t>(bfloat16_bits_of_one<Format>(p + column * Format::kBytes));
    }
    if (k.dim % 2 != 0) to[k.dim] = 0;
  }
}

[[maybe_unused]] __attribute__((noinline)) void pair_keys(CacheFormat format, const HeadRows& k,
                                                          int64_t count, float* out) {
  if (format == CacheFormat::kInt8) return pair_keys_as<Int8>(k, count, out);
  return pair_keys_as<Bfloat16>(k, count, out);
}

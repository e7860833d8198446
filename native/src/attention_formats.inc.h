// Reading the cache's formats as vectors of float32. Included once in each compilation of the
// attention kernel, inside an unnamed namespace (see attention_kernel.inc.h).

typedef uint16_t HalfVec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 2)));
typedef uint16_t MemoryHalfVec
    __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES / 2), aligned(1), may_alias));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef int16_t Halves __attribute__((vector_size(16)));
typedef uint32_t UintVec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES)));
typedef float MemoryFloat __attribute__((aligned(1), may_alias));
typedef uint16_t MemoryHalf __attribute__((aligned(1), may_alias));
typedef int32_t MemoryInt __attribute__((aligned(1), may_alias));

// kLanes numbers of 16 bits. By hand, because GCC widens vectors in halves, and bytes one by one;
// with masks, because GCC 12 warns of what the plain intrinsics leave undefined.
DOUBLEWEAVE_INLINE UintVec widened(const std::byte* p) {
#if DOUBLEWEAVE_VECTOR_BYTES == 64
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p));
  return reinterpret_cast<UintVec>(_mm512_maskz_cvtepu16_epi32(0xffff, halves));
#elif DOUBLEWEAVE_VECTOR_BYTES == 32
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p));
  return reinterpret_cast<UintVec>(_mm256_cvtepu16_epi32(halves));
#else
  return __builtin_convertvector(*reinterpret_cast<const MemoryHalfVec*>(p), UintVec);
#endif
}

// Each format says how long a number is, and reads kLanes of them; kHasScale: a scale follows a
// head's numbers, by which they are still to be multiplied.
struct Float32 {
  static constexpr int64_t kBytes = 4;
  static constexpr bool kHasScale = false;
  DOUBLEWEAVE_INLINE Vec load(const std::byte* p) { return *reinterpret_cast<const MemoryVec*>(p); }
};

struct Bfloat16 {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kHasScale = false;
  DOUBLEWEAVE_INLINE Vec load(const std::byte* p) {
    return reinterpret_cast<Vec>(widened(p) << 16);
  }
};

struct Float16 {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kHasScale = false;
#if defined(__F16C__) && DOUBLEWEAVE_VECTOR_BYTES == 64
  DOUBLEWEAVE_INLINE Vec load(const std::byte* p) {
    return reinterpret_cast<Vec>(
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p))));
  }
#elif defined(__F16C__) && DOUBLEWEAVE_VECTOR_BYTES == 32
  DOUBLEWEAVE_INLINE Vec load(const std::byte* p) {
    return reinterpret_cast<Vec>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))));
  }
#else
  // The exponent moves to its place in a float32, and 2^112 makes up for the other bias, also in
  // what is too small to be normal.
  DOUBLEWEAVE_INLINE Vec load(const std::byte* p) {
    const UintVec half = widened(p);
    const UintVec magnitude = (half & 0x7fff) << 13;
    const UintVec finite = reinterpret_cast<UintVec>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
    const UintVec other = magnitude | 0x7f800000;
    const UintVec bits = (half & 0x7c00) == 0x7c00 ? other : finite;
    return reinterpret_cast<Vec>(bits | (half & 0x8000) << 16);
  }
#endif
};

struct Int8 {
  static constexpr int64_t kBytes = 1;
  static constexpr bool kHasScale = true;
  DOUBLEWEAVE_INLINE Vec load(const std::byte* p) {
#if DOUBLEWEAVE_VECTOR_BYTES == 64
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p));
    const auto numbers = reinterpret_cast<IntVec>(_mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif DOUBLEWEAVE_VECTOR_BYTES == 32
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p));
    const auto numbers = reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(bytes));
#else
    // Twice beside zeros, each byte is the highest of a lane, and is shifted down with its sign.
    const auto bytes = reinterpret_cast<Bytes>(splat_int(*reinterpret_cast<const MemoryInt*>(p)));
    const auto halves = reinterpret_cast<Halves>(__builtin_shufflevector(
        Bytes{}, bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    const Halves highest = __builtin_shufflevector(Halves{}, halves, 0, 8, 1, 9, 2, 10, 3, 11);
    const IntVec numbers = reinterpret_cast<IntVec>(highest) >> 24;
#endif
    return __builtin_convertvector(numbers, Vec);
  }
};

// One number with zeros behind it, to be read as a vector where fewer than kLanes are left.
template <typename Format>
struct Alone {
  explicit Alone(const std::byte* p) {
    for (int64_t i = 0; i < Format::kBytes; ++i) bytes[i] = p[i];
  }
  std::byte bytes[kLanes * Format::kBytes] = {};
};

DOUBLEWEAVE_INLINE float float_at(const std::byte* p) {
  return *reinterpret_cast<const MemoryFloat*>(p);
}

// Keys or values of one kv head.
struct HeadRows {
  const std::byte* data;  // row 0
  int64_t stride;         // bytes from row to row
  int64_t dim;
};

HeadRows rows_of_head(const AttentionParams& params, const std::byte* data, int64_t kv_head,
                      int64_t dim) {
  const int64_t bytes = head_bytes(params.format, dim);
  return {data + kv_head * bytes, params.num_kv_heads * bytes, dim};
}

HeadRows rows_from(const HeadRows& rows, int64_t first) {
  return {rows.data + first * rows.stride, rows.stride, rows.dim};
}

// The scales of the first `count` rows of Int8.
void gather_scales(const HeadRows& rows, int64_t count, float* scales) {
  const std::byte* p = rows.data + rows.dim;
  for (int64_t i = 0; i < count; ++i, p += rows.stride) scales[i] = float_at(p);
}

// The first `count` rows as float32 [count, dim].
template <typename Format>
void unpack_as(const HeadRows& rows, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, out += rows.dim) {
    const std::byte* p = rows.data + i * rows.stride;
    const float scale = Format::kHasScale ? float_at(p + rows.dim * Format::kBytes) : 1.0f;
    int64_t column = 0;
    for (; column + kLanes <= rows.dim; column += kLanes) {
      const Vec x = Format::load(p + column * Format::kBytes);
      store(out + column, Format::kHasScale ? x * splat(scale) : x);
    }
    for (; column < rows.dim; ++column) {
      const float x = Format::load(Alone<Format>(p + column * Format::kBytes).bytes)[0];
      out[column] = Format::kHasScale ? x * scale : x;
    }
  }
}

__attribute__((noinline)) void unpack(CacheFormat format, const HeadRows& rows, int64_t count,
                                      float* out) {
  switch (format) {
    case CacheFormat::kFloat32:
      return unpack_as<Float32>(rows, count, out);
    case CacheFormat::kBfloat16:
      return unpack_as<Bfloat16>(rows, count, out);
    case CacheFormat::kFloat16:
      return unpack_as<Float16>(rows, count, out);
    case CacheFormat::kInt8:
      return unpack_as<Int8>(rows, count, out);
  }
}

// Vectors for the attention kernel, written with GCC/Clang vector extensions. Included once in each
// compilation of the kernel, inside an unnamed namespace (see attention_kernel.inc.h).
//
// Never compile this with -ffast-math: exp2 and splat rely on exact float32 arithmetic.

constexpr int kLanes = DOUBLEWEAVE_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES)));
// The same in memory: aligned like a float, and allowed to alias arrays of floats.
typedef float MemoryVec
    __attribute__((vector_size(DOUBLEWEAVE_VECTOR_BYTES), aligned(4), may_alias));

// Unrolls a loop of constant length over an array of vectors before it is decided what lives in
// registers: without it, GCC keeps a copy of such arrays on the stack.
#if defined(__clang__)
#define DOUBLEWEAVE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DOUBLEWEAVE_UNROLL _Pragma("GCC unroll 16")
#endif

#define DOUBLEWEAVE_INLINE static inline __attribute__((always_inline))

DOUBLEWEAVE_INLINE Vec load(const float* p) { return *reinterpret_cast<const MemoryVec*>(p); }

DOUBLEWEAVE_INLINE void store(float* p, Vec x) { *reinterpret_cast<MemoryVec*>(p) = x; }

DOUBLEWEAVE_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 folds to a broadcast

DOUBLEWEAVE_INLINE IntVec splat_int(int32_t x) { return x - IntVec{}; }

__attribute__((noinline)) Vec load_partial(const float* p, int64_t n) {
  Vec x{};
  for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  return x;
}

__attribute__((noinline)) void store_partial(float* p, Vec x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}

DOUBLEWEAVE_INLINE Vec load_up_to(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load_partial(p, n);
}

DOUBLEWEAVE_INLINE void store_up_to(float* p, Vec x, int64_t n) {
  n >= kLanes ? store(p, x) : store_partial(p, x, n);
}

// Takes b where they do not compare, so a NaN in b survives and one in a does not.
DOUBLEWEAVE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

DOUBLEWEAVE_INLINE float max_lane(Vec x) {
  float largest = x[0];
  DOUBLEWEAVE_UNROLL
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

DOUBLEWEAVE_INLINE float sum_lanes(Vec x) {
  float sum = 0;
  DOUBLEWEAVE_UNROLL
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// 2^x for x <= 127, to 2 ulp; 0 below 2^-126, so for -infinity; NaN for NaN.
// x = n + f with n whole: adding 1.5 * 2^23 rounds x to n in the low mantissa bits (with the
// exponent bias added on the way, so a shift makes them 2^n); 2^f is the minimax polynomial of
// degree 5 on
// [-1/2, 1/2] with p(0) = 1, fitted for relative error by linear programming, coefficients rounded
// one after the other (the reduction is that of Cephes' exp2f).
DOUBLEWEAVE_INLINE Vec exp2(Vec x) {
  const Vec kRound = splat(0x1.8p23f + 127.0f);
  x = max(splat(-127.0f), x);  // n = -127 makes the exponent bits, and so the result, zero
  const Vec biased = x + kRound;
  const Vec f = x - (biased - kRound);
  const Vec square = f * f;
  const Vec low = f * splat(0x1.62e42ap-1f) + splat(1.0f);
  const Vec middle = f * splat(0x1.c6b6d8p-5f) + splat(0x1.ebf9c2p-3f);
  const Vec high = f * splat(0x1.5bda40p-10f) + splat(0x1.3ce8acp-7f);
  const Vec p = (high * square + middle) * square + low;
  return p * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(biased) << 23);
}

// tanh as in Cephes' tanhf: an odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
DOUBLEWEAVE_INLINE Vec tanh(Vec x) {
  const Vec magnitude = max(x, -x);
  const Vec square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  const Vec near = p * square * x + x;
  const Vec exponent = magnitude * splat(2.885390082f);  // 2 / ln 2
  const Vec clamped = exponent > splat(64.0f) ? splat(64.0f) : exponent;
  const Vec far = splat(1.0f) - splat(2.0f) / (exp2(clamped) + splat(1.0f));
  return magnitude < splat(0.625f) ? near : (x < Vec{} ? -far : far);
}

// The two halves of one step of a transposition: lanes whose index has the bit kHalf change places
// with lanes of the other vector that lack it.
template <int kHalf, int... kLane>
DOUBLEWEAVE_INLINE Vec merge_low(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, ((kLane & kHalf) ? kLanes + kLane - kHalf : kLane)...);
}

template <int kHalf, int... kLane>
DOUBLEWEAVE_INLINE Vec merge_high(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, ((kLane & kHalf) ? kLanes + kLane : kLane + kHalf)...);
}

using AllLanes = std::make_integer_sequence<int, kLanes>;

// Transposes a square of kLanes vectors (Eklundh's method: swap ever smaller off-diagonal blocks).
template <int kHalf = kLanes / 2>
DOUBLEWEAVE_INLINE void transpose(Vec (&x)[kLanes]) {
  DOUBLEWEAVE_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const Vec low = merge_low<kHalf>(x[i], x[i + kHalf], AllLanes{});
    x[i + kHalf] = merge_high<kHalf>(x[i], x[i + kHalf], AllLanes{});
    x[i] = low;
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2>(x);
}

// Lane i of the result is the sum of the lanes of x[i]; the same steps, added up. Overwrites x.
template <int kHalf = kLanes / 2>
DOUBLEWEAVE_INLINE Vec sum_each(Vec (&x)[kLanes]) {
  DOUBLEWEAVE_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    x[i] = merge_low<kHalf>(x[i], x[i + kHalf], AllLanes{}) +
           merge_high<kHalf>(x[i], x[i + kHalf], AllLanes{});
  }
  if constexpr (kHalf > 1) {
    return sum_each<kHalf / 2>(x);
  } else {
    return x[0];
  }
}

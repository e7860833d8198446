#include "doubleweave/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace doubleweave {

namespace {

constexpr size_t kBlock = 64;

alignas(16) constexpr std::array<uint32_t, 64> kRounds{
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

using State = std::array<uint32_t, 8>;

void add_blocks_plainly(State& state, const std::byte* data, size_t blocks) {
  for (; blocks > 0; --blocks, data += kBlock) {
    std::array<uint32_t, 64> words;
    std::memcpy(words.data(), data, kBlock);
    for (size_t i = 0; i < 16; ++i) {
      words[i] = __builtin_bswap32(words[i]);
    }
    for (size_t i = 16; i < 64; ++i) {
      const uint32_t a = words[i - 15];
      const uint32_t b = words[i - 2];
      words[i] = words[i - 16] + words[i - 7] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ (a >> 3)) +
                 (std::rotr(b, 17) ^ std::rotr(b, 19) ^ (b >> 10));
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (size_t i = 0; i < 64; ++i) {
      const uint32_t one = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                           ((e & f) ^ (~e & g)) + kRounds[i] + words[i];
      const uint32_t two =
          (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
    }
    const State added{a, b, c, d, e, f, g, h};
    std::ranges::transform(state, added, state.begin(), std::plus());
  }
}

#if defined(__x86_64__)

bool has_instructions() {
  return __builtin_cpu_supports("sse4.1") && [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    return (b >> 29 & 1) != 0;
  }();
}

// Four rounds a step, after the instructions' description: the state lies as ABEF and CDGH.
__attribute__((target("sha,sse4.1"))) void add_blocks(State& state, const std::byte* data,
                                                      size_t blocks) {
  auto* const at = reinterpret_cast<__m128i*>(state.data());
  const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const __m128i low = _mm_shuffle_epi32(_mm_loadu_si128(at), 0xb1);
  const __m128i high = _mm_shuffle_epi32(_mm_loadu_si128(at + 1), 0x1b);
  __m128i abef = _mm_alignr_epi8(low, high, 8);
  __m128i cdgh = _mm_blend_epi16(high, low, 0xf0);
  for (; blocks > 0; --blocks, data += kBlock) {
    const __m128i abef_before = abef;
    const __m128i cdgh_before = cdgh;
    __m128i words[4];
    for (size_t i = 0; i < 16; ++i) {
      __m128i& word = words[i % 4];
      if (i < 4) {
        word = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i), order);
      } else {
        const __m128i last = words[(i + 3) % 4];
        word = _mm_sha256msg1_epu32(word, words[(i + 1) % 4]);
        word = _mm_add_epi32(word, _mm_alignr_epi8(last, words[(i + 2) % 4], 4));
        word = _mm_sha256msg2_epu32(word, last);
      }
      const __m128i sum =
          _mm_add_epi32(word, _mm_load_si128(reinterpret_cast<const __m128i*>(kRounds.data()) + i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
  const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128(at, _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128(at + 1, _mm_alignr_epi8(dchg, feba, 8));
}

#elif defined(__aarch64__)

bool has_instructions() { return (getauxval(AT_HWCAP) >> 6 & 1) != 0; }  // HWCAP_SHA2

__attribute__((target("+crypto"))) void add_blocks(State& state, const std::byte* data,
                                                   size_t blocks) {
  uint32x4_t abcd = vld1q_u32(state.data());
  uint32x4_t efgh = vld1q_u32(state.data() + 4);
  for (; blocks > 0; --blocks, data += kBlock) {
    const uint32x4_t abcd_before = abcd;
    const uint32x4_t efgh_before = efgh;
    uint32x4_t words[4];
    for (size_t i = 0; i < 16; ++i) {
      uint32x4_t& word = words[i % 4];
      if (i < 4) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(data) + 16 * i;
        word = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(bytes)));
      } else {
        word = vsha256su1q_u32(vsha256su0q_u32(word, words[(i + 1) % 4]), words[(i + 2) % 4],
                               words[(i + 3) % 4]);
      }
      const uint32x4_t sum = vaddq_u32(word, vld1q_u32(kRounds.data() + 4 * i));
      const uint32x4_t before = abcd;
      abcd = vsha256hq_u32(abcd, efgh, sum);
      efgh = vsha256h2q_u32(efgh, before, sum);
    }
    abcd = vaddq_u32(abcd, abcd_before);
    efgh = vaddq_u32(efgh, efgh_before);
  }
  vst1q_u32(state.data(), abcd);
  vst1q_u32(state.data() + 4, efgh);
}

#else

bool has_instructions() { return false; }
constexpr auto add_blocks = add_blocks_plainly;

#endif

}  // namespace

void Sha256::take(const std::byte* data, size_t blocks) {
  static const bool has_them = has_instructions();
  (has_them && allowed_ ? add_blocks : add_blocks_plainly)(state_, data, blocks);
}

void Sha256::add(const void* data, size_t size) {
  const auto* at = static_cast<const std::byte*>(data);
  const size_t held = size_ % kBlock;
  size_ += size;
  if (held > 0) {
    const size_t taken = std::min(size, kBlock - held);
    std::memcpy(rest_.data() + held, at, taken);
    if (held + taken < kBlock) {
      return;
    }
    take(rest_.data(), 1);
    at += taken;
    size -= taken;
  }
  take(at, size / kBlock);
  std::memcpy(rest_.data(), at + size / kBlock * kBlock, size % kBlock);
}

std::string Sha256::finish() {
  const uint64_t bits = __builtin_bswap64(size_ * 8);
  // A one, zeros up to eight bytes before a block's end, and the number of bits.
  std::array<std::byte, 2 * kBlock> end{std::byte{0x80}};
  const size_t held = size_ % kBlock;
  const size_t zeros = (held < 56 ? 56 : 120) - held;
  std::memcpy(end.data() + zeros, &bits, sizeof(bits));
  add(end.data(), zeros + sizeof(bits));
  std::string text;
  for (const uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) {
      text += "0123456789abcdef"[word >> shift & 15];
    }
  }
  return text;
}

}  // namespace doubleweave

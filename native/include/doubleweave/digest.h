// Digests by which damage to a file is found: XXH64, after its published specification
// (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), with seed 0.
//
// No protection against somebody who changes a file on purpose: the manifest has its SHA-256.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

namespace doubleweave {

/// Bytes of program.pte that one digest is of.
inline constexpr size_t kDigestChunkBytes = size_t{1} << 20;

namespace xxh64 {

inline constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87U;
inline constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FU;
inline constexpr uint64_t kPrime3 = 0x165667B19E3779F9U;
inline constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63U;
inline constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5U;

// The specification reads little-endian numbers, as every machine that we build for does.
static_assert(std::endian::native == std::endian::little);

template <typename Number>
Number read(const unsigned char* at) {
  Number number;
  std::memcpy(&number, at, sizeof(number));
  return number;
}

inline uint64_t round(uint64_t lane, uint64_t word) {
  return std::rotl(lane + word * kPrime2, 31) * kPrime1;
}

}  // namespace xxh64

/// XXH64 of `size` bytes.
inline uint64_t digest(const void* data, size_t size) {
  using namespace xxh64;
  const auto* at = static_cast<const unsigned char*>(data);
  const unsigned char* const end = at + size;
  uint64_t result = kPrime5;
  if (size >= 32) {
    std::array<uint64_t, 4> lanes{kPrime1 + kPrime2, kPrime2, 0, uint64_t{0} - kPrime1};
    for (; end - at >= 32; at += 32) {
      for (size_t lane = 0; lane < 4; ++lane) {
        lanes[lane] = round(lanes[lane], read<uint64_t>(at + 8 * lane));
      }
    }
    result = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) +
             std::rotl(lanes[3], 18);
    for (const uint64_t lane : lanes) {
      result = (result ^ round(0, lane)) * kPrime1 + kPrime4;
    }
  }
  result += size;
  for (; end - at >= 8; at += 8) {
    result = std::rotl(result ^ round(0, read<uint64_t>(at)), 27) * kPrime1 + kPrime4;
  }
  if (end - at >= 4) {
    result = std::rotl(result ^ (read<uint32_t>(at) * kPrime1), 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) {
    result = std::rotl(result ^ (*at * kPrime5), 11) * kPrime1;
  }
  result = (result ^ (result >> 33)) * kPrime2;
  result = (result ^ (result >> 29)) * kPrime3;
  return result ^ (result >> 32);
}

/// A digest as files have it: 16 lower-case hexadecimal digits.
inline std::string digest_text(std::string_view data) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx",
                static_cast<unsigned long long>(digest(data.data(), data.size())));
  return text.data();
}

}  // namespace doubleweave

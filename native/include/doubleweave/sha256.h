// SHA-256, after FIPS 180-4: what a program file is known by. Knows nothing of files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace doubleweave {

class Sha256 {
 public:
  /// Processors that have instructions for it use them, unless not `allowed`.
  explicit Sha256(bool allowed = true) : allowed_(allowed) {}

  /// Takes in the next bytes.
  void add(const void* data, size_t size);

  /// The digest of all bytes, as 64 lower-case hexadecimal digits. Nothing may be added afterwards.
  std::string finish();

 private:
  void take(const std::byte* data, size_t blocks);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> rest_{};  // what does not fill a block yet
  uint64_t size_ = 0;
  bool allowed_;
};

}  // namespace doubleweave

// Buffers that the runtime owns, for the values that pass between methods.
#pragma once

#include <cstddef>
#include <vector>

namespace doubleweave {

/// Buffers 0 … n-1 of fixed sizes, each aligned to 64 bytes, zeroed, and followed by room that
/// kernels may read past the end. They live in one allocation, whose pages are committed as they
/// are first written.
class Buffers {
 public:
  /// Throws Error when the sizes add up to more than the address space, or there is no memory.
  explicit Buffers(const std::vector<size_t>& sizes_bytes);
  ~Buffers();
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  size_t num_buffers() const { return buffers_.size(); }

  /// The address of a buffer. Throws Error for an id out of range, as bytes() does.
  void* data(size_t id) const;
  /// The size it was asked for, in bytes.
  size_t bytes(size_t id) const;
  /// All sizes together, alignment and room included.
  size_t total_bytes() const { return total_bytes_; }

 private:
  struct Buffer {
    size_t offset;
    size_t bytes;
  };
  const Buffer& buffer(size_t id) const;

  std::vector<Buffer> buffers_;
  size_t total_bytes_ = 0;
  std::byte* memory_ = nullptr;
};

}  // namespace doubleweave

#include "doubleweave/buffers.h"

#include <sys/mman.h>

#include "doubleweave/error.h"

namespace doubleweave {
namespace {

constexpr size_t kAlignment = 64;
// XNNPACK's kernels may read (and ignore) a few bytes past the end of their inputs.
constexpr size_t kReadPastEndBytes = 64;
constexpr size_t kMaxBytes = size_t{1} << 46;

}  // namespace

Buffers::Buffers(const std::vector<size_t>& sizes_bytes) {
  for (const size_t size : sizes_bytes) {
    require(size <= kMaxBytes && total_bytes_ <= kMaxBytes, "buffers of more than ", kMaxBytes,
            " bytes were asked for.");
    buffers_.push_back({total_bytes_, size});
    total_bytes_ += (size + kReadPastEndBytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  if (total_bytes_ == 0) {
    return;
  }
  void* memory =
      mmap(nullptr, total_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED, "there is no memory for ", sizes_bytes.size(), " buffers of ",
          total_bytes_, " bytes together.");
  memory_ = static_cast<std::byte*>(memory);
}

Buffers::~Buffers() {
  if (memory_ != nullptr) {
    munmap(memory_, total_bytes_);
  }
}

const Buffers::Buffer& Buffers::buffer(size_t id) const {
  require(id < buffers_.size(), "there are ", buffers_.size(), " buffers, but buffer ", id,
          " was named.");
  return buffers_[id];
}

void* Buffers::data(size_t id) const { return memory_ + buffer(id).offset; }

size_t Buffers::bytes(size_t id) const { return buffer(id).bytes; }

}  // namespace doubleweave

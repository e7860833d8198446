// Gives ExecuTorch the bytes of a program file through one mapping, and keeps few of its pages
// resident.
#pragma once

#include <executorch/runtime/core/data_loader.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace doubleweave {

/// ExecuTorch's own MmapDataLoader maps each piece by itself. Here one mapping serves all, so that
/// trim() finds what lies in it, and huge pages are off: with them a single row of an embedding
/// table makes two megabytes resident.
class FileLoader final : public executorch::runtime::DataLoader {
 public:
  /// Maps the file. `digests`, where there are any, are those of its chunks of kDigestChunkBytes:
  /// each is compared once, when a part of its chunk is first loaded. Throws Error when the file
  /// cannot be opened or mapped, or has another number of chunks.
  FileLoader(const std::string& path, std::vector<uint64_t> digests);
  ~FileLoader() override;
  FileLoader(const FileLoader&) = delete;
  FileLoader& operator=(const FileLoader&) = delete;

  executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(
      size_t offset, size_t size, const SegmentInfo& segment_info) const override;
  executorch::runtime::Result<size_t> size() const override;

  /// Lets the file's pages go but for those that every run reads (keep_mapped); those that are used
  /// again come back from the page cache.
  void trim() const;

  /// Whether a part that was loaded has another digest than it should have.
  bool is_damaged() const { return is_damaged_; }

 private:
  bool check(size_t offset, size_t size, bool is_kept) const;

  void* data_ = nullptr;
  size_t size_ = 0;
  std::vector<uint64_t> digests_;
  mutable std::vector<std::atomic<bool>> is_checked_;  // of each chunk
  mutable std::atomic<bool> is_damaged_{false};
};

/// Says that every run reads these bytes of a mapped file: trim() leaves them alone.
void keep_mapped(const void* data, size_t bytes);

}  // namespace doubleweave

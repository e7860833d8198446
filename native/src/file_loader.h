// Gives ExecuTorch the bytes of a program file through one mapping, and keeps few of its pages
// resident.
#pragma once

#include <executorch/runtime/core/data_loader.h>

#include <cstddef>
#include <string>

namespace doubleweave {

/// ExecuTorch's own MmapDataLoader maps each piece by itself. Here one mapping serves all, so that
/// trim() can let go of every page at once, and huge pages are off: with them a single row of an
/// embedding table makes two megabytes resident.
class FileLoader final : public executorch::runtime::DataLoader {
 public:
  /// Maps the file. Throws Error when it cannot be opened or mapped.
  explicit FileLoader(const std::string& path);
  ~FileLoader() override;
  FileLoader(const FileLoader&) = delete;
  FileLoader& operator=(const FileLoader&) = delete;

  executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(
      size_t offset, size_t size, const SegmentInfo& segment_info) const override;
  executorch::runtime::Result<size_t> size() const override;

  /// Lets the file's pages go; those that are used again come back from the page cache.
  void trim() const;

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace doubleweave

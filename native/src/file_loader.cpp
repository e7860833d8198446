#include "file_loader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

#include "doubleweave/digest.h"
#include "doubleweave/error.h"

namespace doubleweave {

namespace et = executorch::runtime;

namespace {

// The pages at either end may hold a neighbour's bytes; letting go of a clean page only costs a
// fault.
void release_pages(uintptr_t begin, uintptr_t end) {
  if (begin >= end) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = begin / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

// Called when a delegate has packed a weight: the file's pages are not needed any more.
void release_packed(void* /*context*/, void* data, size_t size) {
  release_pages(reinterpret_cast<uintptr_t>(data), reinterpret_cast<uintptr_t>(data) + size);
}

// The ranges of keep_mapped, their ends by where they begin.
struct Kept {
  std::mutex mutex;
  std::map<uintptr_t, uintptr_t> ends;
};

Kept& kept() {
  static Kept all;
  return all;
}

}  // namespace

FileLoader::FileLoader(const std::string& path, std::vector<uint64_t> digests)
    : digests_(std::move(digests)), is_checked_(digests_.size()) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (file < 0 || fstat(file, &status) != 0) {
    const int reason = errno;
    if (file >= 0) {
      close(file);
    }
    throw Error(text("program '", path, "' cannot be opened: ", std::strerror(reason), "."));
  }
  size_ = static_cast<size_t>(status.st_size);
  if (!digests_.empty() && digests_.size() != (size_ + kDigestChunkBytes - 1) / kDigestChunkBytes) {
    close(file);
    throw Error(text("program '", path, "' has ", size_, " bytes, expected ", digests_.size(),
                     " MiB; compile it again."));
  }
  data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  const int reason = errno;
  close(file);
  require(data_ != MAP_FAILED, "program '", path,
          "' cannot be mapped into memory: ", std::strerror(reason), ".");
  // With huge pages one row of an embedding table makes 2 MB resident, and constants scattered in
  // the file 50 MB.
  madvise(data_, size_, MADV_NOHUGEPAGE);
}

FileLoader::~FileLoader() { munmap(data_, size_); }

et::Result<et::FreeableBuffer> FileLoader::load(size_t offset, size_t size,
                                                const SegmentInfo& segment_info) const {
  if (offset > size_ || size > size_ - offset) {
    return et::Error::InvalidArgument;
  }
  // Constants are read where they lie, a row at a time; all else is read as a whole at once.
  if (!check(offset, size, segment_info.segment_type != SegmentInfo::Type::Constant)) {
    return et::Error::InvalidProgram;
  }
  return et::FreeableBuffer(static_cast<const std::byte*>(data_) + offset, size, &release_packed);
}

// Threads that load neighbours may check a chunk twice, which costs less than a lock.
bool FileLoader::check(size_t offset, size_t size, bool is_kept) const {
  if (digests_.empty() || size == 0) {
    return true;
  }
  const size_t last = (offset + size - 1) / kDigestChunkBytes;
  for (size_t chunk = offset / kDigestChunkBytes; chunk <= last; ++chunk) {
    if (is_checked_[chunk]) {
      continue;
    }
    const size_t begin = chunk * kDigestChunkBytes;
    const size_t bytes = std::min(kDigestChunkBytes, size_ - begin);
    std::byte* data = static_cast<std::byte*>(data_) + begin;
    if (digest(data, bytes) != digests_[chunk]) {
      is_damaged_ = true;
      return false;
    }
    if (!is_kept) {
      madvise(data, bytes, MADV_DONTNEED);
    }
    is_checked_[chunk] = true;
  }
  return true;
}

et::Result<size_t> FileLoader::size() const { return size_; }

// The mapping is private and never written: dropping a page loses nothing, and one still in the
// page cache comes back without a read.
void FileLoader::trim() const {
  const auto begin = reinterpret_cast<uintptr_t>(data_);
  const uintptr_t end = begin + size_;
  uintptr_t from = begin;
  const std::scoped_lock lock(kept().mutex);
  // Ranges elsewhere are another program's, or of one that is closed.
  for (auto it = kept().ends.lower_bound(begin); it != kept().ends.end() && it->first < end; ++it) {
    release_pages(from, it->first);
    from = std::max(from, std::min(it->second, end));
  }
  release_pages(from, end);
}

void keep_mapped(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const std::scoped_lock lock(kept().mutex);
  kept().ends[begin] = begin + bytes;
}

}  // namespace doubleweave

#include "doubleweave/kv_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "doubleweave/error.h"

namespace doubleweave {
namespace {

// XNNPACK's kernels may read (and ignore) a few bytes past the end of their inputs.
constexpr size_t kReadPastEndBytes = 128;

size_t page_bytes() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

size_t round_up_to_page(size_t size) {
  return (size + page_bytes() - 1) / page_bytes() * page_bytes();
}

}  // namespace

KvCache::KvCache(std::vector<size_t> row_bytes, int64_t max_tokens, int64_t slack_tokens)
    : max_tokens_(max_tokens), slack_tokens_(slack_tokens) {
  require(max_tokens >= 1 && slack_tokens >= 0,
          "a cache needs room for at least one token, but was asked for ", max_tokens,
          " tokens and ", slack_tokens, " of slack.");
  for (const size_t bytes : row_bytes) {
    const auto num_rows = static_cast<size_t>(max_tokens) + static_cast<size_t>(slack_tokens);
    void* data = MAP_FAILED;
    size_t mapped_bytes = 0;
    const bool fits = bytes > 0 && num_rows < std::numeric_limits<size_t>::max() / 2 / bytes;
    if (fits) {
      // Address space alone, for the longest context: a page becomes memory when its first row is
      // written, and K and V never move, so that methods stay bound to them. NORESERVE: the sum may
      // be more than the machine has.
      mapped_bytes = round_up_to_page(num_rows * bytes + kReadPastEndBytes);
      data = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (data == MAP_FAILED) {
      const std::string reason = fits ? std::strerror(errno) : "the size is out of range";
      release();
      throw Error(text("a cache entry of ", num_rows, " rows of ", bytes,
                       " bytes cannot be reserved: ", reason, "; ask for fewer tokens."));
    }
    entries_.push_back({static_cast<std::byte*>(data), bytes, mapped_bytes});
  }
}

KvCache::~KvCache() { release(); }

void KvCache::release() {
  for (const Entry& entry : entries_) {
    munmap(entry.data, entry.mapped_bytes);
  }
  entries_.clear();
}

const KvCache::Entry& KvCache::entry(size_t index) const {
  require(index < entries_.size(), "the cache has ", entries_.size(), " entries, but entry ", index,
          " was named.");
  return entries_[index];
}

size_t KvCache::row_bytes(size_t index) const { return entry(index).row_bytes; }

void* KvCache::data(size_t index) const { return entry(index).data; }

size_t KvCache::capacity_bytes(size_t index) const {
  return static_cast<size_t>(max_tokens_ + slack_tokens_) * entry(index).row_bytes;
}

void KvCache::note_length(int64_t num_tokens, int64_t num_padding) {
  require(num_tokens >= 0 && num_tokens <= max_tokens_, "the cache holds up to ", max_tokens_,
          " tokens, but ", num_tokens, " were noted; open the session with more.");
  require(num_padding >= 0 && num_tokens + num_padding <= max_tokens_ + slack_tokens_,
          "the cache has ", slack_tokens_, " rows of slack, but ", num_padding,
          " rows of padding were noted.");
  length_ = num_tokens;
  // Padding rows are written too: they are no tokens, but their pages are memory.
  high_water_ = std::max(high_water_, num_tokens + num_padding);
  peak_bytes_ = std::max(peak_bytes_, committed_bytes());
}

void KvCache::truncate(int64_t num_tokens) {
  require(num_tokens >= 0 && num_tokens <= length_, "the cache holds ", length_,
          " tokens and cannot be truncated to ", num_tokens, ".");
  length_ = num_tokens;
  high_water_ = num_tokens;
  for (const Entry& entry : entries_) {
    // The page of the last row stays: it holds rows that are kept.
    const size_t kept = round_up_to_page(static_cast<size_t>(num_tokens) * entry.row_bytes);
    if (kept < entry.mapped_bytes) {
      // The pages read as zeros from now on. A failure would only leave memory in use.
      (void)madvise(entry.data + kept, entry.mapped_bytes - kept, MADV_DONTNEED);
    }
  }
}

size_t KvCache::committed_bytes() const {
  size_t total = 0;
  for (const Entry& entry : entries_) {
    total += round_up_to_page(static_cast<size_t>(high_water_) * entry.row_bytes);
  }
  return total;
}

}  // namespace doubleweave

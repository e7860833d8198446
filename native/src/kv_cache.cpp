#include "doubleweave/kv_cache.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <numeric>

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

KvCache::KvCache(std::vector<size_t> row_bytes, int64_t max_tokens, int64_t slack_tokens,
                 const std::vector<int64_t>& windows)
    : max_tokens_(max_tokens), slack_tokens_(slack_tokens) {
  require(max_tokens >= 1 && slack_tokens >= 0,
          "a cache needs room for at least one token, but was asked for ", max_tokens,
          " tokens and ", slack_tokens, " of slack.");
  require(windows.empty() || windows.size() == row_bytes.size(), "a cache of ", row_bytes.size(),
          " entries was given ", windows.size(), " windows.");
  for (const size_t bytes : row_bytes) {
    Entry entry{};
    entry.row_bytes = bytes;
    reserve(entry);
    entries_.push_back(entry);
  }
  make_rings(windows);
}

void KvCache::reserve(Entry& entry) {
  const auto num_rows = static_cast<size_t>(max_tokens_) + static_cast<size_t>(slack_tokens_);
  const size_t bytes = entry.row_bytes;
  void* data = MAP_FAILED;
  const bool fits = bytes > 0 && num_rows < std::numeric_limits<size_t>::max() / 2 / bytes;
  if (fits) {
    // Address space alone, for the longest context: a page becomes memory when its first row is
    // written, and K and V never move, so that methods stay bound to them. NORESERVE: the sum may
    // be more than the machine has.
    entry.reserved_bytes = round_up_to_page(num_rows * bytes + kReadPastEndBytes);
    data = mmap(nullptr, entry.reserved_bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  if (data == MAP_FAILED) {
    const std::string reason = fits ? std::strerror(errno) : "the size is out of range";
    release();
    throw Error(text("a cache entry of ", num_rows, " rows of ", bytes,
                     " bytes cannot be reserved: ", reason, "; ask for fewer tokens."));
  }
  entry.data = static_cast<std::byte*>(data);
}

void KvCache::make_rings(const std::vector<int64_t>& windows) {
  size_t file_bytes = 0;
  for (size_t i = 0; i < windows.size(); ++i) {
    Entry& entry = entries_[i];
    // The last row of a chunk sees so many rows back, while a whole chunk is written.
    const auto rows = static_cast<size_t>(windows[i] + slack_tokens_);
    // A lap has whole pages and whole rows.
    const size_t step = page_bytes() / std::gcd(page_bytes(), entry.row_bytes);
    const size_t ring_bytes = (rows + step - 1) / step * step * entry.row_bytes;
    if (windows[i] <= 0 || slack_tokens_ == 0 || ring_bytes >= entry.reserved_bytes) continue;
    entry.window = windows[i];
    entry.ring_bytes = ring_bytes;
    entry.file_offset = file_bytes;
    file_bytes += ring_bytes;
  }
  if (file_bytes == 0) return;
  rings_ = memfd_create("doubleweave", MFD_CLOEXEC);
  if (rings_ < 0 || ftruncate(rings_, static_cast<off_t>(file_bytes)) != 0) {
    // Without such files every row has its own place.
    for (Entry& entry : entries_) entry.window = entry.ring_bytes = 0;
  }
}

int64_t KvCache::ring_rows(const Entry& entry) const {
  return static_cast<int64_t>(entry.ring_bytes / entry.row_bytes);
}

// Maps the laps up to row `end`, and lets go of those that no window shows any more.
void KvCache::map_laps(Entry& entry, int64_t end) {
  const size_t bytes = static_cast<size_t>(end) * entry.row_bytes + kReadPastEndBytes;
  const size_t end_lap = (bytes + entry.ring_bytes - 1) / entry.ring_bytes;
  for (; entry.end_lap < end_lap; ++entry.end_lap) {
    const size_t begin = entry.end_lap * entry.ring_bytes;
    const size_t length = std::min(entry.ring_bytes, entry.reserved_bytes - begin);
    const void* found = mmap(entry.data + begin, length, PROT_READ | PROT_WRITE,
                             MAP_SHARED | MAP_FIXED, rings_, static_cast<off_t>(entry.file_offset));
    if (found == MAP_FAILED) {
      throw Error(text("a cache entry of ", entry.row_bytes, " bytes a row cannot be mapped: ",
                       std::strerror(errno), "; close other sessions."));
    }
  }
  const int64_t oldest = std::max<int64_t>(0, length_ - ring_rows(entry));
  unmap_laps(entry, static_cast<size_t>(oldest) * entry.row_bytes / entry.ring_bytes);
}

void KvCache::unmap_laps(Entry& entry, size_t end_lap) {
  end_lap = std::min(end_lap, entry.end_lap);
  if (end_lap <= entry.first_lap) return;
  const size_t begin = entry.first_lap * entry.ring_bytes;
  const size_t end = std::min(end_lap * entry.ring_bytes, entry.reserved_bytes);
  // The address space stays ours. A failure would only leave the laps mapped.
  (void)mmap(entry.data + begin, end - begin, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  entry.first_lap = end_lap;
}

void KvCache::prepare(int64_t end) {
  require(end >= length_ && end <= max_tokens_ + slack_tokens_, "the cache has ",
          max_tokens_ + slack_tokens_, " rows, but ", end, " are to be written.");
  require(length_ == 0 || length_ >= least_length(), "a run that failed has written over what the ",
          "windows show of ", length_, " tokens; reset the session and append them again.");
  if (rings_ < 0) return;
  for (Entry& entry : entries_) {
    if (entry.ring_bytes > 0) map_laps(entry, end);
  }
  written_ = std::max(written_, end);
}

int64_t KvCache::least_length() const {
  int64_t least = 0;
  for (const Entry& entry : entries_) {
    if (entry.ring_bytes > 0 && written_ > ring_rows(entry)) {
      least = std::max(least, written_ - ring_rows(entry) + entry.window - 1);
    }
  }
  return least;
}

KvCache::~KvCache() { release(); }

void KvCache::release() {
  for (const Entry& entry : entries_) {
    munmap(entry.data, entry.reserved_bytes);
  }
  entries_.clear();
  if (rings_ >= 0) close(rings_);
  rings_ = -1;
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

void KvCache::truncate(int64_t num_tokens, bool is_forced) {
  require(num_tokens >= 0 && num_tokens <= length_, "the cache holds ", length_,
          " tokens and cannot be truncated to ", num_tokens, ".");
  require(is_forced || num_tokens == 0 || num_tokens >= least_length(), "the cache holds ", length_,
          " tokens and its windows show rows of ", least_length(), " at least: it cannot be ",
          "truncated to ", num_tokens, ".");
  length_ = num_tokens;
  high_water_ = num_tokens;
  for (Entry& entry : entries_) {
    if (entry.ring_bytes > 0) {
      if (num_tokens == 0) {
        unmap_laps(entry, entry.end_lap);
        entry.first_lap = entry.end_lap = 0;
      }
      continue;
    }
    // The page of the last row stays: it holds rows that are kept.
    const size_t kept = round_up_to_page(static_cast<size_t>(num_tokens) * entry.row_bytes);
    if (kept < entry.reserved_bytes) {
      // The pages read as zeros from now on. A failure would only leave memory in use.
      (void)madvise(entry.data + kept, entry.reserved_bytes - kept, MADV_DONTNEED);
    }
  }
  if (num_tokens == 0 && rings_ >= 0) {
    written_ = 0;
    const off_t bytes = lseek(rings_, 0, SEEK_END);
    (void)fallocate(rings_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, bytes);
  }
  if (is_forced) written_ = std::min(written_, num_tokens);
}

size_t KvCache::bytes_of(const Entry& entry, int64_t num_rows) const {
  const size_t bytes = round_up_to_page(static_cast<size_t>(num_rows) * entry.row_bytes);
  return entry.ring_bytes > 0 ? std::min(bytes, entry.ring_bytes) : bytes;
}

size_t KvCache::committed_bytes() const {
  size_t total = 0;
  for (const Entry& entry : entries_) {
    // What was written into a ring stays in use until it is empty.
    total += bytes_of(entry, entry.ring_bytes > 0 ? written_ : high_water_);
  }
  return total;
}

}  // namespace doubleweave

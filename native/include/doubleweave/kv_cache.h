// A cache of rows that grows with the tokens: reserved as address space, committed as it is
// written. Knows nothing of heads, layers or ExecuTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace doubleweave {

/// Entries (say, K and V of each layer) of up to `max_tokens` rows each, token-major: entry `i` is
/// one contiguous region whose row t starts at data(i) + t * row_bytes(i). Reserving costs address
/// space only; the system commits a page when it is first written. Reading a row never written
/// gives zeros.
///
/// An entry with a window is only ever read that many rows back. It is a ring: the same pages are
/// mapped again and again along its address space, so that row t still starts at
/// data(i) + t * row_bytes(i), and takes the place of the row that lies a ring's length before it.
class KvCache {
 public:
  /// `slack_tokens` more rows follow the last, for chunks padded past the end; they never count as
  /// tokens. No run appends more than so many rows at a time to an entry with a window. `windows`
  /// has the rows that readers see, themselves included, for each entry, 0 for all; empty: all.
  /// Without entries the cache counts tokens alone. Throws Error for a row of no bytes, fewer than
  /// one token, or when the address space is not to be had.
  KvCache(std::vector<size_t> row_bytes, int64_t max_tokens, int64_t slack_tokens = 0,
          const std::vector<int64_t>& windows = {});
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  size_t num_entries() const { return entries_.size(); }
  int64_t max_tokens() const { return max_tokens_; }
  size_t row_bytes(size_t entry) const;

  /// The first row of an entry. Throws Error for an index out of range.
  void* data(size_t entry) const;

  /// Bytes of an entry that may be written: (max_tokens + slack_tokens) * row_bytes.
  size_t capacity_bytes(size_t entry) const;

  /// Tokens in the cache.
  int64_t length() const { return length_; }

  /// Makes room for rows up to `end` (at most max_tokens + slack_tokens), which a run is about to
  /// write behind length(). Throws Error where the rows before them that the windows show are gone,
  /// because a run that failed has written over them.
  void prepare(int64_t end);

  /// The fewest tokens, but for none, that the cache can go back to: what the windows show of fewer
  /// has been written over.
  int64_t least_length() const;

  /// Records that rows [0, num_tokens) are written, and rows up to num_tokens + num_padding may be.
  /// Throws Error when num_tokens is negative or larger than max_tokens, or the padding than the
  /// slack.
  void note_length(int64_t num_tokens, int64_t num_padding = 0);

  /// Keeps the first `num_tokens` tokens and gives the memory of whole pages past them back.
  /// Throws Error unless num_tokens is 0 or least_length() <= num_tokens <= length(). `is_forced`:
  /// fewer than that are taken as well, with rows that are not theirs.
  void truncate(int64_t num_tokens, bool is_forced = false);

  /// Memory in use: pages up to the highest row noted since the last truncation, of all entries.
  size_t committed_bytes() const;
  /// The most that committed_bytes() has been.
  size_t peak_bytes() const { return peak_bytes_; }

 private:
  struct Entry {
    std::byte* data;
    size_t row_bytes;
    size_t reserved_bytes;
    // Of a ring: the rows that are seen, its pages in the file, and which of its laps are mapped.
    int64_t window = 0;
    size_t ring_bytes = 0;
    size_t file_offset = 0;
    size_t first_lap = 0;
    size_t end_lap = 0;
  };
  const Entry& entry(size_t index) const;
  int64_t ring_rows(const Entry& entry) const;
  size_t bytes_of(const Entry& entry, int64_t num_rows) const;
  void reserve(Entry& entry);
  void make_rings(const std::vector<int64_t>& windows);
  void map_laps(Entry& entry, int64_t end);
  void unmap_laps(Entry& entry, size_t end_lap);
  void release();

  std::vector<Entry> entries_;
  int64_t max_tokens_;
  int64_t slack_tokens_;
  int64_t length_ = 0;
  // Rows that may have been written since the memory past them was given back.
  int64_t high_water_ = 0;
  // Rows that may have been written into rings since they were empty.
  int64_t written_ = 0;
  int rings_ = -1;  // the file of all rings' pages
  size_t peak_bytes_ = 0;
};

}  // namespace doubleweave

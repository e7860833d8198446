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
class KvCache {
 public:
  /// `slack_tokens` more rows follow the last, for chunks padded past the end; they never count as
  /// tokens. Without entries it counts tokens alone. Throws Error for a row of no bytes, fewer than
  /// one token, or when the address space is not to be had.
  KvCache(std::vector<size_t> row_bytes, int64_t max_tokens, int64_t slack_tokens = 0);
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

  /// Records that rows [0, num_tokens) are written, and rows up to num_tokens + num_padding may be.
  /// Throws Error when num_tokens is negative or larger than max_tokens, or the padding than the
  /// slack.
  void note_length(int64_t num_tokens, int64_t num_padding = 0);

  /// Keeps the first `num_tokens` tokens and gives the memory of whole pages past them back.
  /// Throws Error unless 0 <= num_tokens <= length().
  void truncate(int64_t num_tokens);

  /// Memory in use: pages up to the highest row noted since the last truncation, of all entries.
  size_t committed_bytes() const;
  /// The most that committed_bytes() has been.
  size_t peak_bytes() const { return peak_bytes_; }

 private:
  struct Entry {
    std::byte* data;
    size_t row_bytes;
    size_t mapped_bytes;
  };
  const Entry& entry(size_t index) const;
  void release();

  std::vector<Entry> entries_;
  int64_t max_tokens_;
  int64_t slack_tokens_;
  int64_t length_ = 0;
  // Rows that may have been written since the memory past them was given back.
  int64_t high_water_ = 0;
  size_t peak_bytes_ = 0;
};

}  // namespace doubleweave

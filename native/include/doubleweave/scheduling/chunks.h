// Cutting a prompt into chunks. Knows nothing of segments or schedules.
#pragma once

#include <vector>

namespace doubleweave::scheduling {

/// Consecutive tokens. A static segment computes `compiled_size` rows, the last of them padding.
struct Chunk {
  int start;
  int num_tokens;
  int compiled_size;
  bool operator==(const Chunk&) const = default;
};

/// The rows that a chunk may have: one of `fixed`, or any number up to `most` where `fixed` is
/// empty.
struct RowSizes {
  std::vector<int> fixed;
  int most;
};

/// Cuts `num_tokens` (at least 1) into chunks of at most `limit` tokens; only the last one is
/// padded.
///
/// Any rows: chunks of equal size, as many as `num_workers` can share evenly. Fixed sizes: the
/// cheapest sequence of sizes, counting padding and calls; the smallest size is allowed whatever
/// `limit` is.
std::vector<Chunk> cut(int num_tokens, const RowSizes& sizes, int num_workers, int limit);

}  // namespace doubleweave::scheduling

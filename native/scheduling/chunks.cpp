#include "doubleweave/scheduling/chunks.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

namespace doubleweave::scheduling {
namespace {

// Below this many rows a chunk's linears no longer run at full speed, so more chunks do not pay.
constexpr int kLeastRows = 32;
// The cost of one more chunk, in rows of work: a method call for every segment.
constexpr int kCallRows = 8;

std::vector<int> even_sizes(int num_tokens, int most, int workers) {
  int count = (num_tokens + most - 1) / most;
  if (workers > 1) {
    const int rounded = (count + workers - 1) / workers * workers;
    count = std::max(count, std::min(rounded, std::max(num_tokens / kLeastRows, 1)));
  }
  std::vector<int> sizes(static_cast<size_t>(count), num_tokens / count);
  for (int i = 0; i < num_tokens % count; ++i) {
    ++sizes[static_cast<size_t>(i)];
  }
  return sizes;
}

// The cheapest sequence of sizes that covers the tokens. Dynamic programming over the tokens that
// are left; all but the last two rounds of a long prompt are of the largest size anyway.
std::vector<int> fixed_sizes(int num_tokens, const std::vector<int>& sizes) {
  const int largest = sizes.back();
  const int full = std::max(0, num_tokens / largest - 1);
  const int rest = num_tokens - full * largest;
  std::vector<std::pair<int, std::vector<int>>> best(static_cast<size_t>(rest) + 1);
  for (int tokens = 1; tokens <= rest; ++tokens) {
    std::optional<std::pair<int, std::vector<int>>> cheapest;
    for (const int size : sizes) {
      auto option = best[static_cast<size_t>(std::max(0, tokens - size))];
      option.first += size + kCallRows;
      option.second.push_back(size);
      if (!cheapest || option < *cheapest) {
        cheapest = std::move(option);
      }
    }
    best[static_cast<size_t>(tokens)] = std::move(*cheapest);
  }
  std::vector<int> found(static_cast<size_t>(full), largest);
  auto& tail = best[static_cast<size_t>(rest)].second;
  // The smallest last, so that padding is at the end alone.
  std::ranges::sort(tail, std::greater<>());
  found.insert(found.end(), tail.begin(), tail.end());
  return found;
}

}  // namespace

std::vector<Chunk> cut(int num_tokens, const RowSizes& sizes, int num_workers, int limit) {
  limit = std::min(limit, sizes.most);
  std::vector<int> found;
  if (sizes.fixed.empty()) {
    found = even_sizes(num_tokens, limit, num_workers);
  } else {
    std::vector<int> allowed = sizes.fixed;
    std::ranges::sort(allowed);
    const int most = std::max(limit, allowed.front());
    std::erase_if(allowed, [&](int size) { return size > most; });
    found = fixed_sizes(num_tokens, allowed);
  }
  std::vector<Chunk> chunks;
  chunks.reserve(found.size());
  int start = 0;
  for (const int size : found) {
    const int tokens = std::min(size, num_tokens - start);
    chunks.push_back({start, tokens, size});
    start += tokens;
  }
  return chunks;
}

}  // namespace doubleweave::scheduling

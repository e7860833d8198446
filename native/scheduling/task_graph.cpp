#include "doubleweave/scheduling/task_graph.h"

#include <algorithm>
#include <utility>

namespace doubleweave::scheduling {
namespace {

using Pairs = std::vector<std::pair<int32_t, int32_t>>;  // a task and what it waits for

// Two chunks in flight use one group of scratch memory at once only if they are a whole number of
// groups apart. Chunks run in rounds of `abreast`: within a round none is a whole number of groups
// ahead of the last, and a round starts no earlier than that behind the last chunk of the round
// before.
class KeepClose {
 public:
  KeepClose(const Pattern& pattern, const Scratch& scratch, int abreast, int num_chunks)
      : pattern_(pattern),
        blocks_(scratch.blocks),
        span_(scratch.groups - 1),
        abreast_(abreast),
        num_chunks_(num_chunks) {}

  void add(int chunk, Pairs& pairs) const {
    // More chunks abreast than half the groups cannot be kept apart; they wait by their buffers.
    if (abreast_ < 2 || abreast_ > (span_ + 1) / 2) {
      return;
    }
    const int last = std::min((chunk / abreast_ + 1) * abreast_, num_chunks_) - 1;
    const int count = static_cast<int>(blocks_.size());
    for (int place = 0; place < count; ++place) {
      const int behind = place - span_;
      if (behind >= 0 && chunk != last) {
        pairs.emplace_back(number(place, chunk), number(behind, last));
      } else if (behind < 0 && chunk >= abreast_ && count + behind >= 0) {
        pairs.emplace_back(number(place, chunk),
                           number(count + behind, chunk / abreast_ * abreast_ - 1));
      }
    }
  }

 private:
  int32_t number(int block, int chunk) const {
    const auto& calls = chunk == num_chunks_ - 1 ? pattern_.last : pattern_.body;
    const auto call = blocks_[static_cast<size_t>(block)];
    const auto place = std::ranges::lower_bound(calls, call) - calls.begin();
    return static_cast<int32_t>(chunk * static_cast<ptrdiff_t>(pattern_.body.size()) + place);
  }

  const Pattern& pattern_;
  const std::vector<int32_t>& blocks_;
  const int span_;
  const int abreast_;
  const int num_chunks_;
};

}  // namespace

int num_abreast(const Choice& choice, const std::string& static_device, size_t chunks) {
  const auto count = [&](const std::string& device) {
    return std::ranges::count(choice.workers, device);
  };
  const auto anywhere = count(kAny);
  return std::min(static_cast<int>(anywhere != 0 ? anywhere : count(static_device)),
                  static_cast<int>(chunks));
}

TaskGraph repeat(const Pattern& pattern, const Scratch& scratch, std::vector<Chunk> chunks,
                 int in_flight, int abreast) {
  const int count = static_cast<int>(chunks.size());
  const auto body = static_cast<int32_t>(pattern.body.size());
  TaskGraph graph{};
  graph.lanes = std::min(in_flight, count);
  const KeepClose keep_close(pattern, scratch, abreast, count);
  graph.after_starts.push_back(0);
  Pairs pairs;  // of one chunk at a time: a chunk's tasks are numbered behind the last one's
  for (int chunk = 0; chunk < count; ++chunk) {
    const bool is_last = chunk == count - 1;
    const auto& calls = is_last ? pattern.last : pattern.body;
    graph.call_of.insert(graph.call_of.end(), calls.begin(), calls.end());
    graph.chunk_of.insert(graph.chunk_of.end(), calls.size(), chunk);
    pairs.clear();
    for (const Wait& wait : is_last ? pattern.last_waits : pattern.body_waits) {
      const int before = chunk + (wait.chunks == kLaneBefore ? -graph.lanes : wait.chunks);
      if (before >= 0) {
        pairs.emplace_back(chunk * body + wait.task, before * body + wait.other);
      }
    }
    keep_close.add(chunk, pairs);
    std::ranges::sort(pairs);
    pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
    auto pair = pairs.begin();
    for (auto task = static_cast<int32_t>(graph.size() - calls.size());
         task < static_cast<int32_t>(graph.size()); ++task) {
      for (; pair != pairs.end() && pair->first == task; ++pair) {
        graph.after.push_back(pair->second);
      }
      graph.after_starts.push_back(static_cast<int32_t>(graph.after.size()));
    }
  }
  graph.chunks = std::move(chunks);
  return graph;
}

}  // namespace doubleweave::scheduling

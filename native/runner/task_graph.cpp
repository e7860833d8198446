#include "task_graph.h"

#include <algorithm>
#include <utility>

namespace doubleweave::runner {

namespace {

// The device of the segments that append to the cache.
const std::string& static_device(const RunFile& file) {
  for (const Call& call : file.calls) {
    for (const int value : call.writes) {
      if (file.values[value].kind == Kind::kCache) {
        return file.segments[call.segment].device;
      }
    }
  }
  return file.segments.front().device;
}

// How many chunks may be in static segments at once.
int num_abreast(const RunFile& file, const Choice& choice, size_t chunks) {
  const auto count = [&](const std::string& device) {
    return std::count(choice.workers.begin(), choice.workers.end(), device);
  };
  const auto anywhere = count(kAny);
  return std::min(static_cast<int>(anywhere != 0 ? anywhere : count(static_device(file))),
                  static_cast<int>(chunks));
}

using Pairs = std::vector<std::pair<int32_t, int32_t>>;  // a task and what it waits for

// Lets no chunk run so far ahead of those abreast that two meet in one group of scratch memory.
void keep_close(const RunFile& file, int abreast, int num_chunks, const Pattern& pattern,
                Pairs& pairs) {
  const int span = file.groups - 1;
  if (abreast < 2 || abreast > (span + 1) / 2) {
    return;
  }
  const auto number = [&](int call, int chunk) {
    const auto& calls = chunk == num_chunks - 1 ? pattern.last : pattern.body;
    const auto place = std::lower_bound(calls.begin(), calls.end(), call) - calls.begin();
    return static_cast<int32_t>(chunk * static_cast<int>(pattern.body.size()) + place);
  };
  const int count = static_cast<int>(file.blocks.size());
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    const int last = std::min((chunk / abreast + 1) * abreast, num_chunks) - 1;
    for (int place = 0; place < count; ++place) {
      const int behind = place - span;
      if (behind >= 0 && chunk != last) {
        pairs.emplace_back(number(file.blocks[place], chunk), number(file.blocks[behind], last));
      } else if (behind < 0 && chunk >= abreast && count + behind >= 0) {
        pairs.emplace_back(number(file.blocks[place], chunk),
                           number(file.blocks[count + behind], chunk / abreast * abreast - 1));
      }
    }
  }
}

}  // namespace

int TaskGraph::buffer(const RunFile& file, int value, int chunk) const {
  const int slots = static_cast<int>(file.slot_row_bytes.size());
  const int slot = file.slot_of[value];
  return slot < 0 ? lanes * slots : chunk % lanes * slots + slot;
}

std::string TaskGraph::name(const RunFile& file, int task) const {
  const Chunk& chunk = chunks[chunk_of[task]];
  return file.calls[call_of[task]].name + "/" + std::to_string(chunk.start) + "+" +
         std::to_string(chunk.num_tokens) + "@" + std::to_string(chunk.compiled_size);
}

int rows_of(const RunFile& file, const Call& call, const Chunk& chunk) {
  if (call.last_row) {
    return 1;
  }
  return file.segments[call.segment].is_static ? chunk.compiled_size : chunk.num_tokens;
}

TaskGraph build_graph(const RunFile& file, const Choice& choice, std::vector<Chunk> chunks) {
  const int count = static_cast<int>(chunks.size());
  TaskGraph graph{};
  // Fewer chunks on their way than asked for is always right, only slower.
  graph.lanes = std::min({choice.in_flight, count, static_cast<int>(file.patterns.size())});
  const Pattern& pattern = file.patterns[static_cast<size_t>(graph.lanes) - 1];
  const auto body = static_cast<int32_t>(pattern.body.size());
  Pairs pairs;
  for (int chunk = 0; chunk < count; ++chunk) {
    const bool is_last = chunk == count - 1;
    const std::vector<int>& calls = is_last ? pattern.last : pattern.body;
    graph.call_of.insert(graph.call_of.end(), calls.begin(), calls.end());
    graph.chunk_of.insert(graph.chunk_of.end(), calls.size(), chunk);
    for (const Wait& wait : is_last ? pattern.last_waits : pattern.body_waits) {
      if (chunk + wait.chunks >= 0) {
        pairs.emplace_back(chunk * body + wait.task, (chunk + wait.chunks) * body + wait.other);
      }
    }
  }
  keep_close(file, num_abreast(file, choice, chunks.size()), count, pattern, pairs);
  std::sort(pairs.begin(), pairs.end());
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  graph.after_starts.assign(graph.size() + 1, 0);
  for (const auto& [task, before] : pairs) {
    ++graph.after_starts[static_cast<size_t>(task) + 1];
    graph.after.push_back(before);
  }
  for (size_t task = 0; task < graph.size(); ++task) {
    graph.after_starts[task + 1] += graph.after_starts[task];
  }
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) {
    rows = std::max<int64_t>(rows, chunk.compiled_size);
  }
  for (int lane = 0; lane < graph.lanes; ++lane) {
    for (const int64_t bytes : file.slot_row_bytes) {
      graph.buffer_bytes.push_back(static_cast<size_t>(bytes * rows));
    }
  }
  bool one_row = false;
  for (const Call& call : file.calls) {
    if (std::find(call.writes.begin(), call.writes.end(), file.output) != call.writes.end()) {
      one_row = call.last_row;
    }
  }
  graph.buffer_bytes.push_back(
      static_cast<size_t>(file.values[file.output].row_bytes * (one_row ? 1 : rows)));
  graph.chunks = std::move(chunks);
  return graph;
}

}  // namespace doubleweave::runner

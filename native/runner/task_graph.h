// The task graph of a run, repeated from the pattern of one chunk: what tasks.py builds, on
// run.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "choice.h"
#include "run_file.h"

namespace doubleweave::runner {

/// Tasks chunk behind chunk. What task t waits for is after[after_starts[t]] … after[after_starts[t
/// + 1] - 1]. Each lane has a copy of a chunk's slots.
struct TaskGraph {
  std::vector<Chunk> chunks;
  std::vector<int32_t> call_of;
  std::vector<int32_t> chunk_of;
  std::vector<int32_t> after_starts;
  std::vector<int32_t> after;
  int lanes;
  std::vector<size_t> buffer_bytes;  // of the lanes' slots, then of the last chunk's output

  size_t size() const { return call_of.size(); }
  /// The buffer of a value of a chunk that lies in a slot, or of the output.
  int buffer(const RunFile& file, int value, int chunk) const;
  /// A task's text form: "block_0/128+100@128".
  std::string name(const RunFile& file, int task) const;
};

/// How many rows of a chunk a call computes.
int rows_of(const RunFile& file, const Call& call, const Chunk& chunk);

TaskGraph build_graph(const RunFile& file, const Choice& choice, std::vector<Chunk> chunks);

}  // namespace doubleweave::runner

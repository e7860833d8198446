// The task graph of a run: the pattern of one chunk, repeated. Knows nothing of workers or costs.
#pragma once

#include <cstdint>

#include "doubleweave/scheduling/choice.h"
#include "doubleweave/scheduling/chunks.h"

namespace doubleweave::scheduling {

/// Task `task` of a chunk waits for task `other` of the chunk that many before (-1, …; 0: the same
/// chunk). kLaneBefore stands for the chunk whose buffers this one takes over: as many before as
/// there are lanes.
struct Wait {
  int task;
  int other;
  int chunks;
};
inline constexpr int kLaneBefore = 1;

/// The calls of a chunk (`body`) and of the last chunk, in order, and the waits between them, which
/// number places among these calls. A program has one pattern for every prompt; the Python package
/// works it out.
struct Pattern {
  std::vector<int32_t> body;
  std::vector<int32_t> last;
  std::vector<Wait> body_waits;
  std::vector<Wait> last_waits;
};

/// The calls that share scratch memory, in order: block i is in group i mod `groups`.
struct Scratch {
  std::vector<int32_t> blocks;
  int groups = 0;
};

/// Tasks chunk behind chunk, an order in which they may run when one chunk is in flight. What task
/// t waits for is after[after_starts[t]] … after[after_starts[t + 1] - 1]. `lanes` chunks may be in
/// flight, each with buffers of its own.
struct TaskGraph {
  std::vector<Chunk> chunks;
  std::vector<int32_t> call_of;
  std::vector<int32_t> chunk_of;
  std::vector<int32_t> after_starts;
  std::vector<int32_t> after;
  int lanes = 1;

  size_t size() const { return call_of.size(); }
};

/// Repeats the pattern for every chunk. `abreast`: how many chunks may be in blocks at once; they
/// are kept so close together that no two meet in one group of scratch memory.
TaskGraph repeat(const Pattern& pattern, const Scratch& scratch, std::vector<Chunk> chunks,
                 int in_flight, int abreast);

/// How many of `chunks` chunks the workers of a choice can have in segments of `static_device` at
/// once.
int num_abreast(const Choice& choice, const std::string& static_device, size_t chunks);

}  // namespace doubleweave::scheduling

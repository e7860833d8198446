// A prepared run: tasks, in an order for each worker, that is replayed as often as wanted.
//
// Preparing checks everything that does not change from run to run; running binds addresses and
// executes. Knows nothing of models, chunks or how the schedule came about.
#pragma once

#include <functional>
#include <optional>
#include <utility>

#include "doubleweave/program.h"
#include "doubleweave/timeline.h"

namespace doubleweave {

/// Where an input or output of a task lies. `base` is the number of tokens in the cache when a run
/// starts: the address is start of buffer + offset + offset_per_token * base, and sizes[grow_dim]
/// grows by base. An execution is prepared once, for base 0, and decodes every token.
struct Binding {
  int32_t buffer = 0;
  std::vector<int32_t> sizes;    // elements; empty, for an output: the method's upper bound
  int64_t offset = 0;            // bytes, not negative
  int64_t offset_per_token = 0;  // bytes, not negative
  int32_t grow_dim = -1;         // -1: no dimension grows
  int64_t offset_per_row = 0;    // bytes, not negative: of a task that runs row by row
  // Bytes from one copy of a state to the other, 0 for what is no state: token t reads copy t % 2
  // and writes the other. `first_copy` is that of row 0 at base 0.
  int64_t copy_bytes = 0;
  int32_t first_copy = 0;
};

/// Copies blocks from one region to another: block i from source_offset + i * source_stride to
/// target_offset + i * target_stride, and zeroes the `pad_bytes` behind it in the target.
/// Everything is in bytes and not negative; `base` does not move it.
///
/// It gathers a chunk of rows out of [B, T, ...] into a padded buffer, and scatters results back.
struct BlockCopy {
  int32_t source = 0;  // regions
  int64_t source_offset = 0;
  int64_t source_stride = 0;
  int32_t target = 0;
  int64_t target_offset = 0;
  int64_t target_stride = 0;
  int64_t num_blocks = 1;
  int64_t block_bytes = 0;
  int64_t pad_bytes = 0;
};

/// One execution of an instance, or one for each of `num_rows` rows in order, or one copy.
struct Task {
  int32_t instance = 0;  // -1 for a copy
  std::vector<Binding> inputs;
  std::vector<Binding> outputs;
  std::vector<int32_t> after;  // tasks that must have finished before
  int32_t label = 0;           // the caller's; named in errors
  std::optional<BlockCopy> copy = std::nullopt;
  int32_t num_rows = 1;
};

/// A buffer's start and its size in bytes: session buffers and cache entries alike.
using Region = std::pair<void*, size_t>;

/// Regions that lie elsewhere for one run: the index of each, and where it lies.
using ReboundRegions = std::vector<std::pair<int32_t, Region>>;

class Execution {
 public:
  /// `workers[w]` lists the tasks of worker w in the order it runs them. Worker 0 is the thread
  /// that calls run(). The instances and the memory must outlive the execution.
  ///
  /// Throws Error when an index is out of range, when a task is on no worker or on several, when a
  /// binding does not fit its method, when a copy does not fit its regions, writes a byte twice, or
  /// reads and writes overlapping spans of one region, when some tasks would wait for ever (naming
  /// them), or when two tasks of one instance on different workers are not ordered.
  Execution(std::vector<Instance*> instances, std::vector<Region> regions, std::vector<Task> tasks,
            std::vector<std::vector<int32_t>> workers, int threads_per_worker = 1);
  ~Execution();
  Execution(const Execution&) = delete;
  Execution& operator=(const Execution&) = delete;

  /// Runs every task once and returns when all have finished.
  ///
  /// `base` is as in Binding. `timeline`, unless null, is overwritten with what ran. `interrupted`,
  /// unless empty, is asked on this thread between its tasks and while it waits, at most every 30
  /// ms or so. `rebound` puts regions elsewhere for this run; each needs at least the bytes of the
  /// region that it replaces.
  ///
  /// Throws Error when a binding would leave its buffer or its method's bounds or a rebound region
  /// is out of range, named twice, null or too small (before anything runs), when a task fails (the
  /// others stop after the task they are in), when another run of it goes on; throws Interrupted
  /// when `interrupted` returned true.
  void run(int64_t base, Timeline* timeline = nullptr,
           const std::function<bool()>& interrupted = {}, const ReboundRegions& rebound = {});

  /// The largest base that run() accepts.
  int64_t max_base() const;
  size_t num_tasks() const;
  int num_workers() const;
  /// How many of its tasks each worker has finished in the run that goes on, or in the last one.
  /// May be asked on any thread.
  std::vector<int32_t> num_finished() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace doubleweave

// When the tasks of a schedule would run, and greedy schedules: discrete-event runs over plain
// arrays.
//
// Knows nothing of ExecuTorch, models or memory; it is linked by itself, so that predicting needs
// no run time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace doubleweave {

/// Tasks as arrays. What task t waits for is after[after_starts[t]] … after[after_starts[t + 1] -
/// 1].
struct TaskArrays {
  std::span<const int64_t> duration_ns;   // run alone
  std::span<const int32_t> after_starts;  // one more than there are tasks
  std::span<const int32_t> after;

  std::span<const int32_t> after_of(size_t task) const {
    const int32_t begin = after_starts[task];
    return after.subspan(begin, after_starts[task + 1] - begin);
  }
};

/// [from][to], square over the workers, row-major: from the end of a task to the start of one that
/// waits for it; on the diagonal, from the end of a task to the start of the next one of its
/// worker.
using HandOvers = std::span<const int64_t>;

/// Tasks that run at the same time slow each other down: [i][j], square over the kinds of tasks,
/// row-major, is how much longer a task of kind i takes while another worker runs one of kind j;
/// 0.1 is 10 % longer.
struct Contention {
  std::span<const int32_t> kind;  // of each task
  std::span<const double> matrix;
};

struct Times {
  std::vector<int64_t> start_ns;
  std::vector<int64_t> end_ns;
};

/// Runs `workers` (lists of task numbers).
///
/// Throws std::invalid_argument where a number is out of range, a task is on no worker or on two,
/// or the schedule would wait for ever.
Times simulate(const TaskArrays& tasks, const std::vector<std::vector<int32_t>>& workers,
               HandOvers hand_overs, const Contention& contention);

/// Which worker may run which task: task t runs on workers of device[t]. Worker home[t] takes it
/// before tasks that are at home elsewhere, and others take it where they would wait.
struct Placement {
  std::span<const int32_t> device;         // of each task
  std::span<const int32_t> worker_device;  // of each worker; -1: any
  std::span<const int64_t> priority;       // of each task; the greatest goes first
  std::span<const int32_t> home;           // of each task, a worker; empty: nowhere
};

/// Gives each worker its list: whenever a worker is free it takes, of the tasks whose inputs are
/// ready (its own first), the one of the greatest priority (of equals, the one with the smaller
/// number).
///
/// Throws std::invalid_argument where a number is out of range, a task has no worker, or tasks wait
/// for each other.
std::vector<std::vector<int32_t>> list_schedule(const TaskArrays& tasks, const Placement& placement,
                                                HandOvers hand_overs);

/// The longest way from each task's start to the end, in nanoseconds.
/// Throws std::invalid_argument where tasks wait for each other.
std::vector<int64_t> path_to_end(const TaskArrays& tasks);

}  // namespace doubleweave

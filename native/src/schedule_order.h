// The order that a schedule guarantees between its tasks.
#pragma once

#include "doubleweave/execution.h"

namespace doubleweave {

/// "The first `num_finished` tasks of `worker` have finished."
struct Wait {
  int32_t worker;
  int32_t num_finished;
};

/// A checked schedule.
struct ScheduleOrder {
  /// The worker of each task, and its place in that worker's list.
  std::vector<int32_t> worker_of;
  std::vector<int32_t> place_of;
  /// What each task waits for, less what its worker's order or an earlier wait already guarantees.
  std::vector<std::vector<Wait>> waits;
};

/// Checks `workers` against the tasks. Throws Error as Execution's constructor does.
ScheduleOrder order_schedule(const std::vector<Task>& tasks,
                             const std::vector<std::vector<int32_t>>& workers,
                             const std::vector<Instance*>& instances);

/// Prints "task 3 (label 7, method 'qkv')" or "task 3 (label 7, copy)".
struct TaskText {
  const std::vector<Task>& tasks;
  const std::vector<Instance*>& instances;
  int32_t task;
};
std::ostream& operator<<(std::ostream& stream, const TaskText& text);

}  // namespace doubleweave

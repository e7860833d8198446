// Schedules over a task graph: the makers, barriers, and when tasks would run.
#pragma once

#include "doubleweave/scheduling/costs.h"
#include "doubleweave/scheduling/simulate.h"

namespace doubleweave::scheduling {

/// A schedule cannot be made or run: a device has no worker, tasks would wait for ever.
class ScheduleError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// In a worker's list: the worker goes on when every worker has reached its barrier of the same
/// number.
inline constexpr int32_t kBarrier = -1;
using Lists = std::vector<std::vector<int32_t>>;

/// For each worker the device whose tasks it runs, and its tasks and barriers in order.
struct Schedule {
  std::vector<std::string> workers;
  Lists lists;
};

/// The parts of a task graph that makers read. `device` is each task's place in `devices`.
struct Tasks {
  std::span<const int32_t> call_of;
  std::span<const int32_t> chunk_of;
  std::span<const int32_t> after_starts;
  std::span<const int32_t> after;
  std::span<const int32_t> device;
  std::vector<std::string> devices;

  size_t size() const { return call_of.size(); }
};

/// Makes the schedule of that name (one of kSchedules). Throws ScheduleError where a device of the
/// tasks has no worker.
Schedule make_schedule(const std::string& name, const Tasks& tasks,
                       const std::vector<std::string>& workers, const Costs& costs);

/// The workers' lists of tasks alone, and what each task waits for with the barriers as
/// dependencies.
struct Ordered {
  Lists lists;
  std::vector<int32_t> after_starts;
  std::vector<int32_t> after;
};
Ordered without_barriers(const Lists& lists, std::span<const int32_t> after_starts,
                         std::span<const int32_t> after);

/// Nanoseconds from worker to worker, row-major; a worker of any device pays the largest that could
/// apply.
std::vector<int64_t> hand_overs(const std::vector<std::string>& workers,
                                const std::vector<std::string>& devices, const Costs& costs);

/// When each task of a schedule would start and end. Throws ScheduleError where one would wait for
/// ever.
Times times_of(const Schedule& schedule, const Tasks& tasks, const Costs& costs);

}  // namespace doubleweave::scheduling

#include "doubleweave/scheduling/schedule.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>

namespace doubleweave::scheduling {
namespace {

// The last task of a worker before each of its barriers, and before its end.
std::vector<std::optional<int32_t>> ends_of(const std::vector<int32_t>& tasks) {
  std::vector<std::optional<int32_t>> ends;
  std::optional<int32_t> latest;
  for (const int32_t task : tasks) {
    if (task == kBarrier) {
      ends.push_back(latest);
    } else {
      latest = task;
    }
  }
  ends.push_back(latest);
  return ends;
}

// The tasks that each task waits for because of a barrier: the first task behind a worker's barrier
// waits for the last one of every other worker before the barrier of the same number.
std::vector<std::set<int32_t>> barrier_waits(const Lists& lists, size_t num_tasks) {
  std::vector<std::vector<std::optional<int32_t>>> ends;
  for (const auto& tasks : lists) {
    ends.push_back(ends_of(tasks));
  }
  std::vector<std::set<int32_t>> waits(num_tasks);
  for (size_t worker = 0; worker < lists.size(); ++worker) {
    size_t passed = 0;
    bool is_first = false;
    for (const int32_t task : lists[worker]) {
      if (task == kBarrier) {
        ++passed;
        is_first = true;
      } else if (is_first && task >= 0 && task < static_cast<int32_t>(num_tasks)) {
        for (size_t other = 0; other < lists.size(); ++other) {
          const auto end = ends[other][std::min(passed, ends[other].size()) - 1];
          if (other != worker && end) {
            waits[static_cast<size_t>(task)].insert(*end);
          }
        }
        is_first = false;
      }
    }
  }
  return waits;
}

}  // namespace

std::vector<int64_t> hand_overs(const std::vector<std::string>& workers,
                                const std::vector<std::string>& devices, const Costs& costs) {
  std::vector<int64_t> found;
  for (size_t i = 0; i < workers.size(); ++i) {
    for (size_t j = 0; j < workers.size(); ++j) {
      int64_t most = 0;
      for (size_t a = 0; a < devices.size(); ++a) {
        for (size_t b = 0; b < devices.size(); ++b) {
          if ((workers[i] == kAny || workers[i] == devices[a]) &&
              (workers[j] == kAny || workers[j] == devices[b])) {
            most = std::max(most, costs.hand_over_ns[a * devices.size() + b]);
          }
        }
      }
      found.push_back(i == j ? costs.same_worker_ns : most);
    }
  }
  return found;
}

Ordered without_barriers(const Lists& lists, std::span<const int32_t> after_starts,
                         std::span<const int32_t> after) {
  Ordered found{{}, {after_starts.begin(), after_starts.end()}, {after.begin(), after.end()}};
  bool has_barriers = false;
  for (const auto& tasks : lists) {
    auto& alone = found.lists.emplace_back(tasks);
    has_barriers = std::erase(alone, kBarrier) != 0 || has_barriers;
  }
  if (!has_barriers) {
    return found;
  }
  auto waits = barrier_waits(lists, after_starts.size() - 1);
  found.after.clear();
  for (size_t task = 0; task < waits.size(); ++task) {
    waits[task].insert(after.begin() + after_starts[task], after.begin() + after_starts[task + 1]);
    found.after.insert(found.after.end(), waits[task].begin(), waits[task].end());
    found.after_starts[task + 1] = static_cast<int32_t>(found.after.size());
  }
  return found;
}

Times times_of(const Schedule& schedule, const Tasks& tasks, const Costs& costs) {
  const Ordered ordered = without_barriers(schedule.lists, tasks.after_starts, tasks.after);
  // A call's cost depends on what its worker ran before, which only the lists say.
  std::vector<int64_t> durations = costs.duration_ns;
  for (const auto& list : costs.repeated.empty() ? Lists{} : ordered.lists) {
    for (size_t i = 1; i < list.size(); ++i) {
      const auto task = static_cast<size_t>(list[i]);
      if (task >= tasks.size() || static_cast<size_t>(list[i - 1]) >= tasks.size()) {
        continue;  // simulate refuses the list
      }
      // Behind the same call its keys and values are still in the processor's cache.
      if (tasks.call_of[task] == tasks.call_of[static_cast<size_t>(list[i - 1])]) {
        durations[task] = static_cast<int64_t>(
            std::nearbyint(costs.repeated[task] * static_cast<double>(costs.duration_ns[task])));
      }
    }
  }
  try {
    return simulate({durations, ordered.after_starts, ordered.after}, ordered.lists,
                    hand_overs(schedule.workers, tasks.devices, costs),
                    {tasks.device, costs.contention});
  } catch (const std::invalid_argument& error) {
    throw ScheduleError(std::string("schedule: ") + error.what());
  }
}

}  // namespace doubleweave::scheduling

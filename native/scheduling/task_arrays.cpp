#include "task_arrays.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace doubleweave {

void require(bool holds, const char* message) {
  if (!holds) {
    throw std::invalid_argument(message);
  }
}

void check_tasks(const TaskArrays& tasks) {
  const auto num_tasks = static_cast<int32_t>(tasks.duration_ns.size());
  require(tasks.after_starts.size() == tasks.duration_ns.size() + 1 && tasks.after_starts[0] == 0 &&
              tasks.after_starts.back() == static_cast<int32_t>(tasks.after.size()),
          "the starts of the tasks' dependencies do not fit their list");
  for (int32_t t = 0; t < num_tasks; ++t) {
    require(tasks.after_starts[t] <= tasks.after_starts[t + 1],
            "the starts of the tasks' dependencies must not fall");
    require(tasks.duration_ns[t] >= 0, "a task's duration must not be negative");
  }
  for (const int32_t before : tasks.after) {
    require(before >= 0 && before < num_tasks, "a task waits for one that does not exist");
  }
}

void check_hand_overs(HandOvers hand_overs, size_t num_workers) {
  require(hand_overs.size() == num_workers * num_workers,
          "hand-overs must be square over the workers");
  for (const int64_t hand_over : hand_overs) {
    require(hand_over >= 0, "a hand-over must not be negative");
  }
}

size_t check_contention(const Contention& contention, size_t num_tasks) {
  require(contention.kind.size() == num_tasks, "each task needs a kind");
  size_t num_kinds = 0;
  for (const int32_t kind : contention.kind) {
    require(kind >= 0, "a task's kind must not be negative");
    num_kinds = std::max(num_kinds, static_cast<size_t>(kind) + 1);
  }
  const auto side = static_cast<size_t>(std::lround(std::sqrt(contention.matrix.size())));
  require(side * side == contention.matrix.size() && side >= num_kinds,
          "contention must be square over the kinds of tasks");
  for (const double value : contention.matrix) {
    require(value >= 0 && std::isfinite(value), "contention must be finite and not negative");
  }
  return side;
}

Successors successors_of(const TaskArrays& tasks) {
  const size_t num_tasks = tasks.duration_ns.size();
  Successors result{std::vector<int32_t>(num_tasks + 1, 0),
                    std::vector<int32_t>(tasks.after.size())};
  for (const int32_t before : tasks.after) {
    ++result.starts[before + 1];
  }
  std::partial_sum(result.starts.begin(), result.starts.end(), result.starts.begin());
  std::vector<int32_t> next(result.starts.begin(), result.starts.end() - 1);
  for (size_t t = 0; t < num_tasks; ++t) {
    for (const int32_t before : tasks.after_of(t)) {
      result.list[next[before]++] = static_cast<int32_t>(t);
    }
  }
  return result;
}

}  // namespace doubleweave

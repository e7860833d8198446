// Checks of task arrays, and their inverse: who waits for a task.
#pragma once

#include "doubleweave/scheduling/simulate.h"

namespace doubleweave {

/// Throws std::invalid_argument with this message unless `holds`.
void require(bool holds, const char* message);

/// Throws std::invalid_argument unless the arrays fit each other.
void check_tasks(const TaskArrays& tasks);

/// Throws std::invalid_argument unless the matrix is square over `num_workers` and not negative.
void check_hand_overs(HandOvers hand_overs, size_t num_workers);

/// Throws std::invalid_argument unless each task has a kind, the matrix is square over the kinds,
/// and its numbers are finite and not negative. Gives the number of kinds.
size_t check_contention(const Contention& contention, size_t num_tasks);

/// What waits for task t: list[starts[t]] … list[starts[t + 1] - 1].
struct Successors {
  std::vector<int32_t> starts;
  std::vector<int32_t> list;

  std::span<const int32_t> of(size_t task) const {
    return std::span(list).subspan(starts[task], starts[task + 1] - starts[task]);
  }
};
Successors successors_of(const TaskArrays& tasks);

}  // namespace doubleweave

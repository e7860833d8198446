// Schedules over a task graph, and the costs that they are made by: what makers.py and costs.py
// say.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "run_file.h"
#include "task_graph.h"

namespace doubleweave::runner {

/// `workers[w]` lists the tasks of worker w in order; `after[t]` is what task t waits for, barriers
/// included.
struct Schedule {
  std::vector<std::vector<int32_t>> workers;
  std::vector<std::vector<int32_t>> after;
};

/// The schedule of choice.schedule. Throws Error where a device of the program has no worker.
Schedule make_schedule(const RunFile& file, const TaskGraph& graph, const Choice& choice);

/// One line a worker, as Schedule.text of the Python package writes it (without barriers).
std::string schedule_text(const RunFile& file, const TaskGraph& graph, const Choice& choice,
                          const Schedule& schedule);

}  // namespace doubleweave::runner

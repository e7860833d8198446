// The record of a run: when each task ran, and on which worker.
#pragma once

#include <cstdint>
#include <vector>

namespace doubleweave {

/// One task that ran. Times are nanoseconds of the steady clock since the run began.
struct Event {
  int64_t task;
  int64_t worker;
  int64_t start_ns;
  int64_t end_ns;
};

/// The events of one run: worker by worker, each in the order it ran them. After a run that failed
/// it holds the tasks that had finished.
struct Timeline {
  std::vector<Event> events;
};

}  // namespace doubleweave

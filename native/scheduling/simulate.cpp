#include "doubleweave/scheduling/simulate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "task_arrays.h"

namespace doubleweave {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

void check_places(size_t num_tasks, const std::vector<std::vector<int32_t>>& workers) {
  std::vector<bool> is_placed(num_tasks, false);
  size_t num_placed = 0;
  for (const auto& list : workers) {
    for (const int32_t t : list) {
      require(t >= 0 && t < static_cast<int32_t>(num_tasks) && !is_placed[t],
              "a worker lists a task that does not exist or is placed twice");
      is_placed[t] = true;
      ++num_placed;
    }
  }
  require(num_placed == num_tasks, "a task is on no worker");
}

// One worker's place in its list.
struct WorkerState {
  size_t place = 0;
  int32_t running = -1;  // a task, or -1
  double remaining = 0;  // of it, in nanoseconds run alone
  double ready = 0;      // when the next task may start at the earliest
};

class Simulation {
 public:
  Simulation(const TaskArrays& tasks, const std::vector<std::vector<int32_t>>& workers,
             HandOvers hand_overs, const Contention& contention, size_t num_kinds)
      : tasks_(tasks),
        lists_(workers),
        hand_overs_(hand_overs),
        contention_(contention),
        num_kinds_(num_kinds),
        states_(workers.size()),
        worker_of_(tasks.duration_ns.size(), -1) {
    times_.start_ns.resize(tasks.duration_ns.size());
    times_.end_ns.resize(tasks.duration_ns.size());
  }

  Times run() {
    size_t num_finished = 0;
    while (num_finished < tasks_.duration_ns.size()) {
      start_what_can();
      const double next = next_change();
      require(next != kNever, "the schedule would wait for ever");
      num_finished += advance(next);
    }
    return std::move(times_);
  }

 private:
  size_t num_workers() const { return states_.size(); }

  // When worker w may start task t; kNever while something that it waits for has not finished.
  double ready_time(size_t w, int32_t t) const {
    double ready = states_[w].ready;
    for (const int32_t before : tasks_.after_of(t)) {
      const int32_t other = worker_of_[before];
      if (other < 0) {
        return kNever;
      }
      if (other != static_cast<int32_t>(w)) {
        ready = std::max(ready, static_cast<double>(times_.end_ns[before] +
                                                    hand_overs_[other * num_workers() + w]));
      }
    }
    return ready;
  }

  // In the workers' order, as a replay does: it decides nothing, it finds out when things happen.
  void start_what_can() {
    for (size_t w = 0; w < num_workers(); ++w) {
      WorkerState& state = states_[w];
      if (state.running >= 0 || state.place == lists_[w].size()) {
        continue;
      }
      const int32_t t = lists_[w][state.place];
      if (ready_time(w, t) <= now_) {
        state.running = t;
        state.remaining = static_cast<double>(tasks_.duration_ns[t]);
        times_.start_ns[t] = std::llround(now_);
      }
    }
  }

  // How much longer the task of worker w takes now than alone; the shares of several workers add
  // up.
  double slow_down(size_t w) const {
    double factor = 1;
    const size_t row = contention_.kind[states_[w].running] * num_kinds_;
    for (size_t other = 0; other < num_workers(); ++other) {
      if (other != w && states_[other].running >= 0) {
        factor += contention_.matrix[row + contention_.kind[states_[other].running]];
      }
    }
    return factor;
  }

  double next_change() const {
    double next = kNever;
    for (size_t w = 0; w < num_workers(); ++w) {
      const WorkerState& state = states_[w];
      if (state.running >= 0) {
        next = std::min(next, now_ + state.remaining * slow_down(w));
      } else if (state.place < lists_[w].size()) {
        next = std::min(next, ready_time(w, lists_[w][state.place]));
      }
    }
    return next;
  }

  // Goes on to `next`; returns how many tasks finished then.
  size_t advance(double next) {
    // Rates first, for all: a task that finishes now slowed the others down until now.
    for (size_t w = 0; w < num_workers(); ++w) {
      WorkerState& state = states_[w];
      if (state.running >= 0) {
        rates_.push_back(slow_down(w));
        state.remaining -= (next - now_) / rates_.back();
      } else {
        rates_.push_back(1);
      }
    }
    size_t num_finished = 0;
    for (size_t w = 0; w < num_workers(); ++w) {
      WorkerState& state = states_[w];
      // Less than a tenth of a nanosecond is rounding.
      if (state.running < 0 || state.remaining * rates_[w] > 0.1) {
        continue;
      }
      const int32_t t = state.running;
      times_.end_ns[t] = std::llround(next);
      worker_of_[t] = static_cast<int32_t>(w);
      state.running = -1;
      ++state.place;
      state.ready = static_cast<double>(times_.end_ns[t] + hand_overs_[w * num_workers() + w]);
      ++num_finished;
    }
    rates_.clear();
    now_ = next;
    return num_finished;
  }

  const TaskArrays& tasks_;
  const std::vector<std::vector<int32_t>>& lists_;
  const HandOvers hand_overs_;
  const Contention& contention_;
  const size_t num_kinds_;
  std::vector<WorkerState> states_;
  std::vector<int32_t> worker_of_;  // of finished tasks
  std::vector<double> rates_;
  Times times_;
  double now_ = 0;
};

}  // namespace

Times simulate(const TaskArrays& tasks, const std::vector<std::vector<int32_t>>& workers,
               HandOvers hand_overs, const Contention& contention) {
  check_tasks(tasks);
  check_hand_overs(hand_overs, workers.size());
  const size_t num_kinds = check_contention(contention, tasks.duration_ns.size());
  check_places(tasks.duration_ns.size(), workers);
  return Simulation(tasks, workers, hand_overs, contention, num_kinds).run();
}

}  // namespace doubleweave

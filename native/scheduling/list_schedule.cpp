#include <algorithm>
#include <limits>
#include <queue>
#include <utility>

#include "doubleweave/scheduling/simulate.h"
#include "task_arrays.h"

namespace doubleweave {
namespace {

// In an order in which they may run. Throws where there is none.
std::vector<int32_t> topological_order(const TaskArrays& tasks, const Successors& successors) {
  const size_t num_tasks = tasks.duration_ns.size();
  std::vector<int32_t> missing(num_tasks);
  std::vector<int32_t> order;
  order.reserve(num_tasks);
  for (size_t t = 0; t < num_tasks; ++t) {
    missing[t] = static_cast<int32_t>(tasks.after_of(t).size());
    if (missing[t] == 0) {
      order.push_back(static_cast<int32_t>(t));
    }
  }
  for (size_t i = 0; i < order.size(); ++i) {
    for (const int32_t next : successors.of(order[i])) {
      if (--missing[next] == 0) {
        order.push_back(next);
      }
    }
  }
  require(order.size() == num_tasks, "some tasks wait for each other");
  return order;
}

// Greedy list scheduling (Graham, 1969), event by event. Ready tasks wait in queues by device and
// home, not in one queue: a worker looks at a few heads and never passes over tasks that do not
// fit.
class ListScheduler {
 public:
  ListScheduler(const TaskArrays& tasks, const Placement& placement, HandOvers hand_overs)
      : tasks_(tasks),
        placement_(placement),
        hand_overs_(hand_overs),
        successors_(successors_of(tasks)),
        lists_(placement.worker_device.size()),
        free_at_(placement.worker_device.size(), 0),
        end_(tasks.duration_ns.size(), 0),
        worker_of_(tasks.duration_ns.size(), -1),
        missing_(tasks.duration_ns.size()) {
    const int32_t num_devices =
        placement.device.empty() ? 0 : *std::ranges::max_element(placement.device) + 1;
    waiting_.resize(num_devices);
    ready_.resize(lists_.size() + 1, std::vector<Queue>(num_devices));
    for (size_t t = 0; t < missing_.size(); ++t) {
      missing_[t] = static_cast<int32_t>(tasks.after_of(t).size());
      if (missing_[t] == 0) {
        add(static_cast<int32_t>(t));
      }
    }
  }

  std::vector<std::vector<int32_t>> run() {
    for (size_t num_placed = 0; num_placed < missing_.size();) {
      const size_t placed = place_ready();
      num_placed += placed;
      require(placed != 0 || step(), "some tasks wait for each other");
    }
    return std::move(lists_);
  }

 private:
  using Timed = std::pair<int64_t, int32_t>;  // (when, task), the earliest first
  using Queue = std::priority_queue<Timed, std::vector<Timed>, std::greater<>>;

  bool fits(size_t worker, int32_t device) const {
    return placement_.worker_device[worker] < 0 || placement_.worker_device[worker] == device;
  }

  // When worker w may start t, as far as what t waits for goes.
  int64_t inputs_ready(size_t w, int32_t t) const {
    int64_t ready = 0;
    for (const int32_t before : tasks_.after_of(t)) {
      const auto other = static_cast<size_t>(worker_of_[before]);
      const int64_t hand_over = other == w ? 0 : hand_overs_[other * lists_.size() + w];
      ready = std::max(ready, end_[before] + hand_over);
    }
    return ready;
  }

  // Everything that t waits for is placed: it may start when the first worker that it fits may.
  void add(int32_t t) {
    int64_t earliest = std::numeric_limits<int64_t>::max();
    for (size_t w = 0; w < lists_.size(); ++w) {
      if (fits(w, placement_.device[t])) {
        earliest = std::min(earliest, inputs_ready(w, t));
      }
    }
    require(earliest != std::numeric_limits<int64_t>::max(), "a task's device has no worker");
    waiting_[placement_.device[t]].emplace(earliest, t);
  }

  // Gives each free worker the best task that is ready now; returns how many were placed.
  size_t place_ready() {
    for (size_t device = 0; device < waiting_.size(); ++device) {
      Queue& waiting = waiting_[device];
      while (!waiting.empty() && waiting.top().first <= now_) {
        const int32_t t = waiting.top().second;
        ready_[home(t)][device].emplace(-placement_.priority[t], t);
        waiting.pop();
      }
    }
    size_t num_placed = 0;
    for (size_t w = 0; w < lists_.size(); ++w) {
      if (free_at_[w] > now_) {
        continue;
      }
      // Its own first: their rows are still in this core's cache.
      Queue* best = better(w, ready_[w], nullptr);
      const bool has_own = best != nullptr;
      for (size_t other = 0; !has_own && other < ready_.size(); ++other) {
        best = better(w, ready_[other], best);
      }
      if (best != nullptr) {
        place(w, best->top().second);
        best->pop();
        ++num_placed;
      }
    }
    return num_placed;
  }

  // The queue whose first task is the best for worker w: `best`, or one of `queues`, by device.
  Queue* better(size_t w, std::vector<Queue>& queues, Queue* best) const {
    for (size_t device = 0; device < queues.size(); ++device) {
      Queue& queue = queues[device];
      if (fits(w, static_cast<int32_t>(device)) && !queue.empty() &&
          (best == nullptr || queue.top() < best->top())) {
        best = &queue;
      }
    }
    return best;
  }

  // The worker at which a task is at home; one past the last worker: nowhere.
  size_t home(int32_t t) const {
    return placement_.home.empty() ? lists_.size() : static_cast<size_t>(placement_.home[t]);
  }

  // Contention is left out: what runs beside the task is not known yet. `simulate` counts it when
  // schedules are compared.
  void place(size_t w, int32_t t) {
    lists_[w].push_back(t);
    worker_of_[t] = static_cast<int32_t>(w);
    end_[t] = std::max(now_, inputs_ready(w, t)) + tasks_.duration_ns[t];
    free_at_[w] = end_[t] + hand_overs_[w * lists_.size() + w];
    running_.emplace(end_[t], t);
  }

  // Goes on to the next time at which something changes; false if nothing will.
  bool step() {
    int64_t next = std::numeric_limits<int64_t>::max();
    if (!running_.empty()) {
      next = running_.top().first;
    }
    for (const Queue& waiting : waiting_) {
      if (!waiting.empty() && waiting.top().first > now_) {
        next = std::min(next, waiting.top().first);
      }
    }
    for (const int64_t free_at : free_at_) {
      if (free_at > now_) {
        next = std::min(next, free_at);
      }
    }
    if (next == std::numeric_limits<int64_t>::max()) {
      return false;
    }
    now_ = std::max(now_, next);
    while (!running_.empty() && running_.top().first <= now_) {
      const int32_t t = running_.top().second;
      running_.pop();
      for (const int32_t next_task : successors_.of(t)) {
        if (--missing_[next_task] == 0) {
          add(next_task);
        }
      }
    }
    return true;
  }

  const TaskArrays& tasks_;
  const Placement& placement_;
  const HandOvers hand_overs_;
  const Successors successors_;
  std::vector<std::vector<int32_t>> lists_;
  std::vector<int64_t> free_at_;
  std::vector<int64_t> end_;
  std::vector<int32_t> worker_of_;
  std::vector<int32_t> missing_;  // how many of the tasks that it waits for have not finished
  std::vector<Queue> waiting_;    // by device: (when its inputs are ready, task)
  std::vector<std::vector<Queue>> ready_;  // by home and device: (minus its priority, task)
  Queue running_;                          // (when it ends, task)
  int64_t now_ = 0;
};

}  // namespace

std::vector<std::vector<int32_t>> list_schedule(const TaskArrays& tasks, const Placement& placement,
                                                HandOvers hand_overs) {
  check_tasks(tasks);
  check_hand_overs(hand_overs, placement.worker_device.size());
  const size_t num_tasks = tasks.duration_ns.size();
  require(placement.device.size() == num_tasks && placement.priority.size() == num_tasks,
          "each task needs a device and a priority");
  for (const int32_t device : placement.device) {
    require(device >= 0, "a task's device must not be negative");
  }
  require(placement.home.empty() || placement.home.size() == num_tasks,
          "each task needs a home, or none has one");
  for (const int32_t home : placement.home) {
    require(home >= 0 && home < static_cast<int32_t>(placement.worker_device.size()),
            "a task's home is a worker that does not exist");
  }
  return ListScheduler(tasks, placement, hand_overs).run();
}

std::vector<int64_t> path_to_end(const TaskArrays& tasks) {
  check_tasks(tasks);
  const Successors successors = successors_of(tasks);
  const std::vector<int32_t> order = topological_order(tasks, successors);
  std::vector<int64_t> path(order.size(), 0);
  for (auto t = order.rbegin(); t != order.rend(); ++t) {
    for (const int32_t next : successors.of(*t)) {
      path[*t] = std::max(path[*t], path[next]);
    }
    path[*t] += tasks.duration_ns[*t];
  }
  return path;
}

}  // namespace doubleweave

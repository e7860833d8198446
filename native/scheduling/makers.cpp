#include <algorithm>
#include <numeric>
#include <set>

#include "doubleweave/scheduling/schedule.h"

namespace doubleweave::scheduling {
namespace {

class Maker {
 public:
  Maker(const Tasks& tasks, const std::vector<std::string>& workers, const Costs& costs)
      : tasks_(tasks),
        workers_(workers),
        costs_(costs),
        arrays_{costs.duration_ns, tasks.after_starts, tasks.after},
        hand_overs_(hand_overs(workers, tasks.devices, costs)) {
    for (const std::string& device : tasks.devices) {
      able_.push_back(able(device));
    }
  }

  Lists make(const std::string& name) const {
    if (name == "lockstep") {
      return lockstep();
    }
    if (name == "pipelined") {
      // In order, as soon as inputs are ready: a free worker takes the earliest chunk's task.
      return listed(in_order(), {});
    }
    if (name == "out_of_order") {
      // The task with the longest way still to go comes first, whichever chunk it is of: tasks of
      // later chunks may overtake (critical-path list scheduling; as llm.npu does, arXiv
      // 2407.05858).
      return listed(urgency(), {});
    }
    return wavefront();
  }

 private:
  // The workers that can run a device's tasks: its own, or those of any device.
  std::vector<int32_t> able(const std::string& device) const {
    std::vector<int32_t> own;
    std::vector<int32_t> any;
    for (size_t worker = 0; worker < workers_.size(); ++worker) {
      if (workers_[worker] == device) {
        own.push_back(static_cast<int32_t>(worker));
      } else if (workers_[worker] == kAny) {
        any.push_back(static_cast<int32_t>(worker));
      }
    }
    if (own.empty() && any.empty()) {
      throw ScheduleError("workers: found " + (workers_.empty() ? "none" : joined(workers_, ", ")) +
                          ", but the program has segments for '" + device +
                          "'; add a worker for it, such as --workers " + joined(workers_, ",") +
                          (workers_.empty() ? "" : ",") + device);
    }
    return own.empty() ? any : own;
  }

  std::vector<int64_t> urgency() const { return path_to_end(arrays_); }

  std::vector<int64_t> in_order() const {
    std::vector<int64_t> priority(tasks_.size());
    for (size_t task = 0; task < priority.size(); ++task) {
      priority[task] = -static_cast<int64_t>(task);
    }
    return priority;
  }

  Lists listed(const std::vector<int64_t>& priority, const std::vector<int32_t>& homes) const {
    std::vector<int32_t> devices;
    for (const std::string& worker : workers_) {
      // A device that no task is of gets a number past the others: its worker stays idle.
      const auto at = std::ranges::find(tasks_.devices, worker);
      devices.push_back(worker == kAny ? -1 : static_cast<int32_t>(at - tasks_.devices.begin()));
    }
    return list_schedule(arrays_, {tasks_.device, devices, priority, homes}, hand_overs_);
  }

  // Every task at home, chunk behind chunk.
  Lists pinned(const std::vector<int32_t>& homes) const {
    std::vector<int32_t> workers(workers_.size());
    std::iota(workers.begin(), workers.end(), 0);
    if (tasks_.devices.size() > 1 && std::set<int32_t>(homes.begin(), homes.end()).size() > 1) {
      return list_schedule(arrays_, {homes, workers, in_order(), {}}, hand_overs_);
    }
    Lists lists(workers.size());
    for (size_t task = 0; task < homes.size(); ++task) {
      lists[static_cast<size_t>(homes[task])].push_back(static_cast<int32_t>(task));
    }
    return lists;
  }

  // The worker of each task where each chunk has one worker of every device. There and back
  // (0 1 2 2 1 0 …) nobody gets the longer chunk of each pair: later chunks attend to more.
  std::vector<int32_t> homes(bool there_and_back) const {
    std::vector<int32_t> found(tasks_.size());
    for (size_t task = 0; task < tasks_.size(); ++task) {
      const std::vector<int32_t>& own = able_[static_cast<size_t>(tasks_.device[task])];
      const int count = static_cast<int>(own.size());
      const int turn = tasks_.chunk_of[task] % (2 * count);
      const int place = there_and_back ? std::min(turn, 2 * count - 1 - turn) : turn % count;
      found[task] = own[static_cast<size_t>(place)];
    }
    return found;
  }

  // Each worker of a device takes chunks of its own, one layer or so behind the worker before. A
  // chunk's values stay in that core's cache, and workers meet only where a chunk needs the rows
  // of earlier ones. But later chunks attend to more, so that somebody waits in every round; a
  // worker that would wait may take the most urgent task of another one's chunk. Of these ways to
  // deal the chunks out the one with the shortest makespan is taken.
  Lists wavefront() const {
    const std::vector<int32_t> in_turn = homes(false);
    std::vector<Lists> dealt{pinned(in_turn), pinned(homes(true)), listed(urgency(), in_turn)};
    std::vector<int64_t> ends;
    for (const Lists& lists : dealt) {
      const Times times = times_of({workers_, lists}, tasks_, costs_);
      ends.push_back(*std::ranges::max_element(times.end_ns));
    }
    return dealt[static_cast<size_t>(std::ranges::min_element(ends) - ends.begin())];
  }

  bool is_ready(int32_t task, const std::vector<bool>& done) const {
    return std::ranges::all_of(arrays_.after_of(static_cast<size_t>(task)),
                               [&](int32_t before) { return done[static_cast<size_t>(before)]; });
  }

  // Two chunks, one segment apart, and a barrier after each step: as mllm does
  // (UbiquitousLearning/mllm). Even chunks follow each other in one row, odd ones in a second row
  // that is a step behind.
  Lists lockstep() const {
    std::vector<int32_t> rows[2];
    for (size_t task = 0; task < tasks_.size(); ++task) {
      rows[tasks_.chunk_of[task] % 2].push_back(static_cast<int32_t>(task));
    }
    Lists lists(workers_.size());
    std::vector<bool> done(tasks_.size());
    size_t at[2] = {0, 0};
    for (size_t count = 0; count < tasks_.size();) {
      std::vector<int32_t> step;
      for (size_t row = 0; row < 2; ++row) {
        // A task that waits for another one of this step stands still for a step.
        if (at[row] < rows[row].size() && is_ready(rows[row][at[row]], done)) {
          const int32_t task = rows[row][at[row]++];
          const auto& own = able_[static_cast<size_t>(tasks_.device[static_cast<size_t>(task)])];
          lists[static_cast<size_t>(own[row % own.size()])].push_back(task);
          step.push_back(task);
        }
      }
      if (step.empty()) {
        throw ScheduleError("schedule: some tasks wait for each other");
      }
      for (const int32_t task : step) {
        done[static_cast<size_t>(task)] = true;
      }
      count += step.size();
      for (auto& tasks : lists) {
        tasks.push_back(kBarrier);
      }
    }
    for (auto& tasks : lists) {
      tasks.pop_back();
    }
    return lists;
  }

  const Tasks& tasks_;
  const std::vector<std::string>& workers_;
  const Costs& costs_;
  const TaskArrays arrays_;
  const std::vector<int64_t> hand_overs_;
  Lists able_;  // by device
};

}  // namespace

Schedule make_schedule(const std::string& name, const Tasks& tasks,
                       const std::vector<std::string>& workers, const Costs& costs) {
  const Maker maker(tasks, workers, costs);
  if (name == "sequential") {
    // One worker for every device, chunk behind chunk.
    std::vector<int32_t> all(tasks.size());
    std::iota(all.begin(), all.end(), 0);
    return {{kAny}, {all}};
  }
  return {workers, maker.make(name)};
}

}  // namespace doubleweave::scheduling

#include "schedule_order.h"

#include <algorithm>

#include "doubleweave/error.h"

namespace doubleweave {
namespace {

using Workers = std::vector<std::vector<int32_t>>;

void check_indices(const std::vector<Task>& tasks, const std::vector<Instance*>& instances) {
  const auto num_tasks = static_cast<int32_t>(tasks.size());
  for (int32_t t = 0; t < num_tasks; ++t) {
    const Task& task = tasks[t];
    if (task.copy.has_value()) {
      require(task.instance == -1 && task.inputs.empty() && task.outputs.empty(),
              TaskText{tasks, instances, t}, " names instance ", task.instance, " and binds ",
              task.inputs.size(), " inputs and ", task.outputs.size(),
              " outputs, but a copy names instance -1 and binds none.");
    } else if (task.instance < 0 || task.instance >= static_cast<int32_t>(instances.size())) {
      throw Error(text("task ", t, " (label ", task.label, ") names instance ", task.instance,
                       " of ", instances.size(), "."));
    }
    for (const int32_t before : task.after) {
      require(before >= 0 && before < num_tasks, TaskText{tasks, instances, t}, " waits for task ",
              before, ", but there are ", num_tasks, ".");
    }
  }
}

void place_tasks(const std::vector<Task>& tasks, const Workers& workers,
                 const std::vector<Instance*>& instances, ScheduleOrder& order) {
  order.worker_of.assign(tasks.size(), -1);
  order.place_of.assign(tasks.size(), -1);
  require(!workers.empty(), "a schedule needs at least one worker, but has none.");
  for (size_t w = 0; w < workers.size(); ++w) {
    for (size_t place = 0; place < workers[w].size(); ++place) {
      const int32_t t = workers[w][place];
      require(t >= 0 && t < static_cast<int32_t>(tasks.size()), "worker ", w, " lists task ", t,
              ", but there are ", tasks.size(), ".");
      require(order.worker_of[t] < 0, TaskText{tasks, instances, t},
              " is scheduled twice: on worker ", order.worker_of[t], " and on worker ", w, ".");
      order.worker_of[t] = static_cast<int32_t>(w);
      order.place_of[t] = static_cast<int32_t>(place);
    }
  }
  for (size_t t = 0; t < tasks.size(); ++t) {
    require(order.worker_of[t] >= 0, TaskText{tasks, instances, static_cast<int32_t>(t)},
            " is on no worker.");
  }
}

// Runs the schedule without executing anything: the tasks in an order in which they may finish. A
// schedule that waits for ever is refused here, before its first run could hang.
std::vector<int32_t> simulate(const std::vector<Task>& tasks, const Workers& workers,
                              const std::vector<Instance*>& instances, const ScheduleOrder& order) {
  std::vector<int32_t> finished;
  std::vector<size_t> next(workers.size(), 0);
  const auto has_finished = [&](int32_t t) {
    return static_cast<size_t>(order.place_of[t]) < next[order.worker_of[t]];
  };
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t w = 0; w < workers.size(); ++w) {
      while (next[w] < workers[w].size()) {
        const int32_t t = workers[w][next[w]];
        if (!std::ranges::all_of(tasks[t].after, has_finished)) {
          break;
        }
        ++next[w];
        finished.push_back(t);
        progress = true;
      }
    }
  }
  if (finished.size() == tasks.size()) {
    return finished;
  }
  std::string stuck;
  for (size_t w = 0; w < workers.size(); ++w) {
    if (next[w] == workers[w].size()) {
      continue;
    }
    const int32_t t = workers[w][next[w]];
    const auto before = std::ranges::find_if_not(tasks[t].after, has_finished);
    stuck += text(stuck.empty() ? "" : "; ", "worker ", w, " at ", TaskText{tasks, instances, t},
                  " waits for ", TaskText{tasks, instances, *before});
  }
  throw Error(text("the schedule would wait for ever: ", stuck, "; reorder the workers' tasks."));
}

// Vector clocks (Fidge, Mattern, 1988): clocks[t][w] is how many of worker w's tasks have surely
// finished when t has. They show which dependencies an earlier wait implies, so that a run looks at
// few counters, and whether two users of an instance are ordered whatever the timing.
void find_waits(const std::vector<Task>& tasks, const Workers& workers,
                const std::vector<Instance*>& instances, const std::vector<int32_t>& finish_order,
                ScheduleOrder& order) {
  std::vector<std::vector<int32_t>> clocks(tasks.size());
  std::vector<int32_t> last_use(instances.size(), -1);
  order.waits.resize(tasks.size());
  for (const int32_t t : finish_order) {
    const int32_t worker = order.worker_of[t];
    const int32_t place = order.place_of[t];
    std::vector<int32_t> clock =
        place == 0 ? std::vector<int32_t>(workers.size(), 0) : clocks[workers[worker][place - 1]];
    const std::vector<int32_t> before = clock;
    for (const int32_t a : tasks[t].after) {
      for (size_t w = 0; w < clock.size(); ++w) {
        clock[w] = std::max(clock[w], clocks[a][w]);
      }
    }
    for (const int32_t a : tasks[t].after) {
      const int32_t w = order.worker_of[a];
      auto& waits = order.waits[t];
      if (order.place_of[a] < before[w]) {
        continue;  // this worker's task before already knows of it
      }
      // Workers go in order, so that of one worker's tasks the last stands for all.
      const auto same =
          std::ranges::find_if(waits, [&](const Wait& wait) { return wait.worker == w; });
      if (same == waits.end()) {
        waits.push_back({w, order.place_of[a] + 1});
      } else {
        same->num_finished = std::max(same->num_finished, order.place_of[a] + 1);
      }
    }
    if (!tasks[t].copy.has_value()) {
      int32_t& last = last_use[tasks[t].instance];
      if (last >= 0 && order.place_of[last] >= clock[order.worker_of[last]]) {
        throw Error(text(
            TaskText{tasks, instances, last}, " on worker ", order.worker_of[last], " and ",
            TaskText{tasks, instances, t}, " on worker ", worker,
            " share an instance but nothing orders them; add a dependency or use two instances."));
      }
      last = t;
    }
    clock[worker] = place + 1;
    clocks[t] = std::move(clock);
  }
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const TaskText& text) {
  const Task& task = text.tasks[text.task];
  stream << "task " << text.task << " (label " << task.label << ", ";
  if (task.copy.has_value()) {
    return stream << "copy)";
  }
  return stream << "method '" << text.instances[task.instance]->method() << "')";
}

ScheduleOrder order_schedule(const std::vector<Task>& tasks, const Workers& workers,
                             const std::vector<Instance*>& instances) {
  ScheduleOrder order;
  check_indices(tasks, instances);
  place_tasks(tasks, workers, instances, order);
  const std::vector<int32_t> finish_order = simulate(tasks, workers, instances, order);
  find_waits(tasks, workers, instances, finish_order, order);
  return order;
}

}  // namespace doubleweave

#include "schedules.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "doubleweave/error.h"
#include "doubleweave/simulate.h"

namespace doubleweave::runner {

namespace {

using Lists = std::vector<std::vector<int32_t>>;

// The interval of a number and how far along it lies; the first or last one beyond the ends.
std::pair<size_t, double> place(double at, const std::vector<double>& points) {
  if (points.size() == 1) {
    return {0, 0.0};
  }
  const auto above = std::upper_bound(points.begin(), points.end(), at) - points.begin();
  const auto left = static_cast<size_t>(
      std::clamp<ptrdiff_t>(above - 1, 0, static_cast<ptrdiff_t>(points.size()) - 2));
  return {left, (at - points[left]) / (points[left + 1] - points[left])};
}

double time_us(const TimeTable& times, double rows, double cached) {
  const auto [i, share] = place(rows, times.rows);
  const auto [j, along] = place(cached, times.cached);
  const size_t next_i = std::min(i + 1, times.rows.size() - 1);
  const size_t next_j = std::min(j + 1, times.cached.size() - 1);
  const double here = times.us[i][j] + along * (times.us[i][next_j] - times.us[i][j]);
  const double there =
      times.us[next_i][j] + along * (times.us[next_i][next_j] - times.us[next_i][j]);
  return std::max(here + share * (there - here), 0.0);
}

double repeated_share(const TimeTable& times, double cached) {
  if (times.repeated.empty()) {
    return 1.0;
  }
  const double at = std::clamp(cached, times.cached.front(), times.cached.back());
  const auto [j, along] = place(at, times.cached);
  const size_t next = std::min(j + 1, times.cached.size() - 1);
  return times.repeated[j] + along * (times.repeated[next] - times.repeated[j]);
}

// The one whose number is nearest to the wanted one; of two, the smaller.
template <typename Item>
const Item& nearest(const std::vector<Item>& items, int Item::* number, int wanted) {
  return *std::min_element(items.begin(), items.end(), [&](const Item& a, const Item& b) {
    return std::pair(std::abs(a.*number - wanted), a.*number) <
           std::pair(std::abs(b.*number - wanted), b.*number);
  });
}

class Maker {
 public:
  Maker(const RunFile& file, const TaskGraph& graph, const Choice& choice)
      : file_(file), graph_(graph), choice_(choice) {
    for (const Segment& segment : file.segments) {
      able(segment.device);
    }
    find_durations();
    find_hand_overs();
    find_contention();
  }

  Lists make() {
    const std::string& name = choice_.schedule;
    if (name == "sequential") {
      std::vector<int32_t> all(graph_.size());
      std::iota(all.begin(), all.end(), 0);
      return {all};
    }
    if (name == "lockstep") {
      return lockstep();
    }
    if (name == "pipelined") {
      return listed(in_order(), {});
    }
    return name == "wavefront" ? wavefront() : listed(path_to_end(arrays(duration_ns_)), {});
  }

  /// Dependencies that barriers add: (task, what it waits for).
  const std::vector<std::pair<int32_t, int32_t>>& barriers() const { return barriers_; }

 private:
  // The workers that can run a device's tasks: its own, or those of any device.
  std::vector<int32_t> able(const std::string& device) const {
    std::vector<int32_t> own;
    std::vector<int32_t> any;
    for (size_t worker = 0; worker < choice_.workers.size(); ++worker) {
      if (choice_.workers[worker] == device) {
        own.push_back(static_cast<int32_t>(worker));
      } else if (choice_.workers[worker] == kAny) {
        any.push_back(static_cast<int32_t>(worker));
      }
    }
    if (own.empty() && any.empty()) {
      throw Error("workers: the program has segments for '" + device +
                  "', but none of the workers runs them; add one");
    }
    return own.empty() ? any : own;
  }

  const Segment& segment_of(size_t task) const {
    return file_.segments[file_.calls[graph_.call_of[task]].segment];
  }

  int device_of(const std::string& name) const {
    const auto found = std::find(file_.devices.begin(), file_.devices.end(), name);
    return found == file_.devices.end() ? -1 : static_cast<int>(found - file_.devices.begin());
  }

  TaskArrays arrays(const std::vector<int64_t>& durations) const {
    return {durations, graph_.after_starts, graph_.after};
  }

  void find_durations() {
    for (size_t task = 0; task < graph_.size(); ++task) {
      const Call& call = file_.calls[graph_.call_of[task]];
      const Chunk& chunk = graph_.chunks[graph_.chunk_of[task]];
      const Segment& segment = segment_of(task);
      const TimeTable& times = nearest(segment.times, &TimeTable::threads, choice_.threads);
      const int rows = rows_of(file_, call, chunk);
      const double ns = time_us(times, rows, chunk.start) * 1e3;
      duration_ns_.push_back(static_cast<int64_t>(std::nearbyint(ns)));
      repeated_.push_back(repeated_share(times, chunk.start));
      device_.push_back(device_of(segment.device));
    }
  }

  void find_hand_overs() {
    const auto& workers = choice_.workers;
    for (size_t i = 0; i < workers.size(); ++i) {
      for (size_t j = 0; j < workers.size(); ++j) {
        int64_t most = 0;
        for (size_t a = 0; a < file_.devices.size(); ++a) {
          for (size_t b = 0; b < file_.devices.size(); ++b) {
            if ((workers[i] == kAny || workers[i] == file_.devices[a]) &&
                (workers[j] == kAny || workers[j] == file_.devices[b])) {
              most = std::max(most, file_.hand_over_ns[a][b]);
            }
          }
        }
        hand_over_ns_.push_back(i == j ? file_.same_worker_ns : most);
      }
    }
  }

  void find_contention() {
    const size_t devices = file_.devices.size();
    contention_.assign(devices * devices, 0.0);
    if (file_.contention.empty()) {
      return;
    }
    const runner::Contention& found = nearest(file_.contention, &runner::Contention::workers,
                                              static_cast<int>(choice_.workers.size()));
    for (size_t a = 0; a < devices; ++a) {
      std::copy(found.shares[a].begin(), found.shares[a].end(),
                contention_.begin() + static_cast<ptrdiff_t>(a * devices));
    }
  }

  std::vector<int64_t> in_order() const {
    std::vector<int64_t> priority(graph_.size());
    for (size_t task = 0; task < priority.size(); ++task) {
      priority[task] = -static_cast<int64_t>(task);
    }
    return priority;
  }

  Lists listed(const std::vector<int64_t>& priority, const std::vector<int32_t>& homes) const {
    std::vector<int32_t> workers;
    for (const std::string& device : choice_.workers) {
      workers.push_back(device == kAny ? -1 : device_of(device));
    }
    return list_schedule(arrays(duration_ns_), {device_, workers, priority, homes}, hand_over_ns_);
  }

  // Every task at home, chunk behind chunk.
  Lists pinned(const std::vector<int32_t>& homes) const {
    std::vector<int32_t> workers(choice_.workers.size());
    std::iota(workers.begin(), workers.end(), 0);
    if (file_.devices.size() > 1 && std::set<int32_t>(homes.begin(), homes.end()).size() > 1) {
      return list_schedule(arrays(duration_ns_), {homes, workers, in_order(), {}}, hand_over_ns_);
    }
    Lists lists(workers.size());
    for (size_t task = 0; task < homes.size(); ++task) {
      lists[static_cast<size_t>(homes[task])].push_back(static_cast<int32_t>(task));
    }
    return lists;
  }

  std::vector<int32_t> homes(bool there_and_back) const {
    std::vector<int32_t> found;
    for (size_t task = 0; task < graph_.size(); ++task) {
      const std::vector<int32_t> own = able(segment_of(task).device);
      const int count = static_cast<int>(own.size());
      const int chunk = graph_.chunk_of[task];
      const int turn = chunk % (2 * count);
      found.push_back(own[there_and_back ? std::min(turn, 2 * count - 1 - turn) : chunk % count]);
    }
    return found;
  }

  // Of the ways to deal the chunks out the one with the shortest makespan.
  Lists wavefront() const {
    const std::vector<int32_t> in_turn = homes(false);
    std::vector<Lists> dealt{pinned(in_turn), pinned(homes(true)),
                             listed(path_to_end(arrays(duration_ns_)), in_turn)};
    std::vector<int64_t> ends;
    for (const Lists& lists : dealt) {
      std::vector<int64_t> durations = duration_ns_;
      for (const auto& tasks : lists) {
        for (size_t i = 1; i < tasks.size(); ++i) {
          const auto task = static_cast<size_t>(tasks[i]);
          if (graph_.call_of[task] == graph_.call_of[static_cast<size_t>(tasks[i - 1])]) {
            durations[task] = static_cast<int64_t>(
                std::nearbyint(repeated_[task] * static_cast<double>(duration_ns_[task])));
          }
        }
      }
      const Times times = simulate(arrays(durations), lists, hand_over_ns_, {device_, contention_});
      ends.push_back(*std::max_element(times.end_ns.begin(), times.end_ns.end()));
    }
    return dealt[static_cast<size_t>(std::min_element(ends.begin(), ends.end()) - ends.begin())];
  }

  // Two rows of chunks, a segment apart, and a barrier after each step.
  Lists lockstep() {
    std::vector<int32_t> rows[2];
    for (size_t task = 0; task < graph_.size(); ++task) {
      rows[graph_.chunk_of[task] % 2].push_back(static_cast<int32_t>(task));
    }
    Lists lists(choice_.workers.size());
    std::vector<int32_t> last(lists.size(), -1);  // before the latest barrier
    std::vector<bool> done(graph_.size());
    size_t at[2] = {0, 0};
    size_t count = 0;
    while (count < graph_.size()) {
      std::vector<std::pair<int32_t, int32_t>> step;  // task and worker
      for (int row = 0; row < 2; ++row) {
        if (at[row] == rows[row].size()) {
          continue;
        }
        const int32_t task = rows[row][at[row]];
        const auto begin = graph_.after.begin();
        if (std::all_of(begin + graph_.after_starts[static_cast<size_t>(task)],
                        begin + graph_.after_starts[static_cast<size_t>(task) + 1],
                        [&](int32_t before) { return done[static_cast<size_t>(before)]; })) {
          const auto own = able(segment_of(static_cast<size_t>(task)).device);
          step.emplace_back(task, own[static_cast<size_t>(row) % own.size()]);
          ++at[row];
        }
      }
      if (step.empty()) {
        throw Error(
            "run.json: its tasks wait for each other; write it again with doubleweave prepare");
      }
      std::set<int32_t> waiting;
      for (const auto& [task, worker] : step) {
        if (waiting.insert(worker).second) {
          for (size_t other = 0; other < lists.size(); ++other) {
            if (other != static_cast<size_t>(worker) && last[other] >= 0) {
              barriers_.emplace_back(task, last[other]);
            }
          }
        }
      }
      for (const auto& [task, worker] : step) {
        lists[static_cast<size_t>(worker)].push_back(task);
        done[static_cast<size_t>(task)] = true;
        ++count;
      }
      for (const auto& [task, worker] : step) {
        last[static_cast<size_t>(worker)] = task;
      }
    }
    return lists;
  }

  const RunFile& file_;
  const TaskGraph& graph_;
  const Choice& choice_;
  std::vector<int64_t> duration_ns_;
  std::vector<double> repeated_;
  std::vector<int32_t> device_;
  std::vector<int64_t> hand_over_ns_;
  std::vector<double> contention_;
  std::vector<std::pair<int32_t, int32_t>> barriers_;
};

}  // namespace

Schedule make_schedule(const RunFile& file, const TaskGraph& graph, const Choice& choice) {
  Maker maker(file, graph, choice);
  Schedule schedule{maker.make(), Lists(graph.size())};
  for (size_t task = 0; task < graph.size(); ++task) {
    schedule.after[task].assign(graph.after.begin() + graph.after_starts[task],
                                graph.after.begin() + graph.after_starts[task + 1]);
  }
  for (const auto& [task, before] : maker.barriers()) {
    auto& waits = schedule.after[static_cast<size_t>(task)];
    if (std::find(waits.begin(), waits.end(), before) == waits.end()) {
      waits.push_back(before);
    }
  }
  return schedule;
}

std::string schedule_text(const RunFile& file, const TaskGraph& graph, const Choice& choice,
                          const Schedule& schedule) {
  std::string text;
  for (size_t worker = 0; worker < schedule.workers.size(); ++worker) {
    text += choice.workers[worker] + ":";
    for (const int32_t task : schedule.workers[worker]) {
      text += ' ';
      text += graph.name(file, task);
    }
    text += '\n';
  }
  return text;
}

}  // namespace doubleweave::runner

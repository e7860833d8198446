#include "doubleweave/scheduling/costs.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace doubleweave::scheduling {
namespace {

// Of one task, so that sums over a graph's tasks stay far from the largest number of nanoseconds.
constexpr double kMostUs = 1e9;

// The interval of a number and how far along it lies; the first or last interval beyond the ends.
std::pair<size_t, double> place(double at, const std::vector<double>& points) {
  if (points.size() == 1) {
    return {0, 0.0};
  }
  const auto above = std::ranges::upper_bound(points, at) - points.begin();
  const auto left = static_cast<size_t>(
      std::clamp<ptrdiff_t>(above - 1, 0, static_cast<ptrdiff_t>(points.size()) - 2));
  return {left, (at - points[left]) / (points[left + 1] - points[left])};
}

double measured_us(const MeasuredTimes& times, double rows, double cached) {
  const auto [i, share] = place(rows, times.rows);
  const auto [j, along] = place(cached, times.cached);
  const size_t next_i = std::min(i + 1, times.rows.size() - 1);
  const size_t next_j = std::min(j + 1, times.cached.size() - 1);
  const double here = times.us[i][j] + along * (times.us[i][next_j] - times.us[i][j]);
  const double there =
      times.us[next_i][j] + along * (times.us[next_i][next_j] - times.us[next_i][j]);
  return std::max(here + share * (there - here), 0.0);
}

// The share of its time that a call behind `cached` tokens takes after the same call.
double repeated_share(const MeasuredTimes& times, double cached) {
  if (times.repeated.empty()) {
    return 1.0;
  }
  const double at = std::clamp(cached, times.cached.front(), times.cached.back());
  const auto [j, along] = place(at, times.cached);
  const size_t next = std::min(j + 1, times.cached.size() - 1);
  return times.repeated[j] + along * (times.repeated[next] - times.repeated[j]);
}

double estimated_us(const EstimatedTimes& times, double rows, double cached, int threads) {
  // A chunk's rows see half of each other.
  const double keys = std::max(cached + rows / 2, 1.0);
  const double compute_us =
      (times.row_us * rows + times.square_us * rows * rows + times.key_us * rows * keys) /
      std::min(threads, times.cores);
  double memory_us = times.call_bytes_us + times.row_bytes_us * rows +
                     times.cached_bytes_us * (cached + rows) +
                     times.expert_bytes_us * (1 - std::pow(1 - times.expert_share, rows));
  for (const auto& [counted_rows, us] : times.counted_us) {
    if (counted_rows == rows) {
      memory_us = us;
    }
  }
  return times.launch_us + std::max(compute_us, memory_us);
}

// The item whose number is nearest to the wanted one; of two, the smaller.
template <typename Item>
const Item& nearest(const std::vector<Item>& items, int Item::* number, int wanted) {
  return *std::ranges::min_element(items, [&](const Item& a, const Item& b) {
    return std::pair(std::abs(a.*number - wanted), a.*number) <
           std::pair(std::abs(b.*number - wanted), b.*number);
  });
}

template <typename T>
std::vector<T> flat(const std::vector<std::vector<T>>& rows) {
  std::vector<T> values;
  for (const auto& row : rows) {
    values.insert(values.end(), row.begin(), row.end());
  }
  return values;
}

}  // namespace

double time_us(const SegmentTimes& times, double rows, double cached, int threads) {
  if (times.measured.empty()) {
    return estimated_us(times.estimated, rows, cached, threads);
  }
  return measured_us(nearest(times.measured, &MeasuredTimes::threads, threads), rows, cached);
}

Costs costs_of(const CostTables& tables, const std::vector<CallCosts>& calls,
               const TaskGraph& graph, int threads, int num_workers, bool all_rows, int cached) {
  Costs costs;
  costs.duration_ns.reserve(graph.size());
  costs.repeated.reserve(graph.size());
  for (size_t task = 0; task < graph.size(); ++task) {
    const CallCosts& call = calls[static_cast<size_t>(graph.call_of[task])];
    const Chunk& chunk = graph.chunks[static_cast<size_t>(graph.chunk_of[task])];
    const SegmentTimes& times = tables.segments[static_cast<size_t>(call.segment)];
    const int rows = call.last_row && !all_rows ? 1
                     : call.is_static           ? chunk.compiled_size
                                                : chunk.num_tokens;
    const double before = cached + chunk.start;
    const double us = std::min(time_us(times, rows, before, threads), kMostUs);
    costs.duration_ns.push_back(static_cast<int64_t>(std::nearbyint(us * 1e3)));
    costs.repeated.push_back(
        times.measured.empty()
            ? 1.0
            : repeated_share(nearest(times.measured, &MeasuredTimes::threads, threads), before));
  }
  costs.hand_over_ns = flat(tables.hand_over_ns);
  costs.same_worker_ns = tables.same_worker_ns;
  if (tables.contention.empty()) {
    costs.contention.assign(costs.hand_over_ns.size(), 0.0);
  } else {
    costs.contention =
        flat(nearest(tables.contention, &ContentionTable::workers, num_workers).shares);
  }
  return costs;
}

}  // namespace doubleweave::scheduling

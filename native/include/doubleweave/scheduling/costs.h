// What the tasks of a graph cost on a machine, from measured times or from a device's published
// figures. Knows nothing of schedules.
#pragma once

#include "doubleweave/scheduling/task_graph.h"

namespace doubleweave::scheduling {

/// A segment's microseconds with `threads` threads: us[i][j] at rows[i] rows behind cached[j]
/// tokens; linear between and beyond them. `repeated[j]` is the share of it that a call takes where
/// its worker has just run the same call for the chunk before (empty: all of it).
struct MeasuredTimes {
  int threads;
  std::vector<double> rows;
  std::vector<double> cached;
  std::vector<std::vector<double>> us;
  std::vector<double> repeated;
};

/// A segment's microseconds by the roofline model (Williams, Waterman, Patterson, 2009): a cost a
/// call, and the longer of computing and moving bytes.
struct EstimatedTimes {
  double launch_us = 0;
  int cores = 1;  // the most threads that share computing
  /// Computing on one core: a row, a row's square, a row times the keys that it sees.
  double row_us = 0;
  double square_us = 0;
  double key_us = 0;
  /// Bytes to and from memory: of a call, a row, a cached token.
  double call_bytes_us = 0;
  double row_bytes_us = 0;
  double cached_bytes_us = 0;
  /// Of all experts' weights, and the share that a row chooses. Rows choose apart from each other.
  double expert_bytes_us = 0;
  double expert_share = 0;
  /// What the device's compiler counted instead, by exact number of rows.
  std::vector<std::pair<double, double>> counted_us;
};

/// The times of a segment: measured, by numbers of threads; estimated where nothing was measured.
struct SegmentTimes {
  std::vector<MeasuredTimes> measured;
  EstimatedTimes estimated;
};

/// A segment's microseconds for `rows` rows behind `cached` tokens with `threads` threads, or the
/// nearest number that was measured.
double time_us(const SegmentTimes& times, double rows, double cached, int threads);

/// How much longer a task of device a takes while another of `workers` workers runs one of device
/// b: shares[a][b]; 0.1 is 10 % longer.
struct ContentionTable {
  int workers;
  std::vector<std::vector<double>> shares;
};

/// The parts of a call that its costs depend on; `device` is a place in a list of devices.
struct CallCosts {
  int segment;
  int device;
  bool is_static;
  bool last_row;  // it computes the last row alone, unless all rows are asked for
};

/// Costs of the tasks of one graph. Matrices are square over the devices, row-major.
struct Costs {
  std::vector<int64_t> duration_ns;   // of each task, run alone
  std::vector<double> repeated;       // of each task; empty: all 1
  std::vector<int64_t> hand_over_ns;  // from a task of one device to a waiting one of another
  int64_t same_worker_ns = 0;         // between two tasks of one worker
  std::vector<double> contention;
};

/// Times of every segment on a machine, by its place; matrices over the same devices as CallCosts.
struct CostTables {
  std::vector<SegmentTimes> segments;
  std::vector<std::vector<int64_t>> hand_over_ns;
  int64_t same_worker_ns = 0;
  std::vector<ContentionTable> contention;
};

/// The costs of a graph's tasks on `num_workers` workers of `threads` threads each, behind `cached`
/// tokens. `calls` are the program's.
Costs costs_of(const CostTables& tables, const std::vector<CallCosts>& calls,
               const TaskGraph& graph, int threads, int num_workers, bool all_rows, int cached);

}  // namespace doubleweave::scheduling

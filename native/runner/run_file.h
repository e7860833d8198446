// run.json: what running a program's prompts takes, worked out by the Python package (run_file.py).
//
// Plain data; every index in it is checked when it is read.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace doubleweave::runner {

/// What stands for a number in a port's shape: the rows at hand, the rows of the cache with them.
constexpr int32_t kRows = -1;
constexpr int32_t kCached = -2;
/// The device of a worker that runs the tasks of every device.
inline const std::string kAny = "any";

inline constexpr std::array<const char*, 5> kSchedules{"sequential", "lockstep", "pipelined",
                                                       "out_of_order", "wavefront"};
bool is_schedule(const std::string& name);

enum class Kind { kInput, kChunk, kCache, kOutput };

struct Value {
  std::string name;
  Kind kind;
  int64_t row_bytes;
};

/// Microseconds by rows and cached tokens; `repeated` is the share of it, by cached tokens, right
/// after the same call (empty: all of it).
struct TimeTable {
  int threads;
  std::vector<double> rows;
  std::vector<double> cached;
  std::vector<std::vector<double>> us;
  std::vector<double> repeated;
};

struct Segment {
  std::string name;
  std::string device;
  bool is_static;    // a method for each size, named segment@size
  bool per_worker;   // each worker has an instance of its own
  bool loads_alone;  // its backend must not load two methods at once
  int group;         // of scratch memory; -1: its own
  std::vector<std::vector<int32_t>> inputs;
  std::vector<std::vector<int32_t>> outputs;
  std::vector<TimeTable> times;
};

struct Call {
  std::string name;
  int segment;
  std::vector<int> reads;
  std::vector<int> writes;
  bool last_row;
};

/// Task `task` of a chunk waits for task `other` of the chunk that many before (-1, …; 0: the
/// same).
struct Wait {
  int task;
  int other;
  int chunks;
};

/// The calls of a chunk and of the last one, and what waits for what, with so many lanes.
struct Pattern {
  std::vector<int> body;
  std::vector<int> last;
  std::vector<Wait> body_waits;
  std::vector<Wait> last_waits;
};

/// How a prompt is run; choice.py says what the fields mean.
struct Choice {
  std::string schedule;
  std::vector<std::string> workers;
  int threads = 1;
  int chunk = 0;
  int in_flight = 1;
  int abreast = 1;
};

struct Decision {
  int tokens;
  Choice choice;
};

struct Contention {
  int workers;
  std::vector<std::vector<double>> shares;  // by devices, as in RunFile::devices
};

/// What a chat template puts around a prompt, which it may strip of white space first.
struct Chat {
  std::string before;
  std::string behind;
  bool strips;
};

struct RunFile {
  int64_t program_bytes;
  int vocab_size;
  int max_context;
  std::vector<int> eos_token_ids;
  bool has_template;         // of chats
  std::optional<Chat> chat;  // what it does, where that is no more than a Chat says
  std::vector<int> sizes;    // fixed sizes; empty: any up to most_rows
  int most_rows;
  std::string overlapping;  // the schedule of several chunks, where none was decided on
  std::vector<Value> values;
  std::vector<Segment> segments;
  std::vector<Call> calls;
  std::vector<int> slot_of;  // of each value; -1: none
  std::vector<int64_t> slot_row_bytes;
  int output;
  std::vector<Pattern> patterns;  // [lanes - 1]
  std::vector<int> blocks;
  int groups;
  std::vector<std::string> devices;
  std::vector<std::vector<int64_t>> hand_over_ns;
  int64_t same_worker_ns;
  std::vector<Contention> contention;
  int threads;
  std::vector<Decision> decisions;
};

/// Reads and checks a program folder's run.json. Throws Error that says what to do.
RunFile read_run_file(const std::filesystem::path& folder);

}  // namespace doubleweave::runner

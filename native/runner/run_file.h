// run.json: what running a program's prompts takes, worked out by the Python package (run_file.py).
//
// Plain data; every index in it is checked when it is read.
#pragma once

#include <filesystem>

#include "doubleweave/scheduling/planner.h"

namespace doubleweave::runner {

/// What stands for a number in a port's shape: the rows at hand, the rows of the cache with them.
constexpr int32_t kRows = -1;
constexpr int32_t kCached = -2;
enum class Kind { kInput, kChunk, kCache, kOutput };

struct Value {
  std::string name;
  Kind kind;
  int64_t row_bytes;
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
};

struct Call {
  std::string name;
  int segment;
  std::vector<int> reads;
  std::vector<int> writes;
  bool last_row;
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
  std::vector<Value> values;
  std::vector<Segment> segments;
  std::vector<Call> calls;
  std::vector<int> slot_of;  // of each value; -1: none
  std::vector<int64_t> slot_row_bytes;
  int output;
  scheduling::Outline outline;
  scheduling::Machine machine;
};

/// Reads and checks a program folder's run.json. Throws Error that says what to do.
RunFile read_run_file(const std::filesystem::path& folder);

}  // namespace doubleweave::runner

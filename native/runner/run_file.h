// run.json: the parts of a program and a machine that running prompts depends on, written by the
// Python package (predict/run_file.py).
//
// Plain data. Every index is checked when the file is read, so that no later code checks one.
#pragma once

#include <filesystem>

#include "doubleweave/scheduling/planner.h"

namespace doubleweave::runner {

/// In a port's shape, in the place of a number: the rows of the chunk; the cached rows with them.
constexpr int32_t kRows = -1;
constexpr int32_t kCached = -2;
enum class Kind { kInput, kChunk, kCache, kState, kOutput, kEncoded };

struct Value {
  std::string name;
  Kind kind;
  int64_t row_bytes;
  int64_t window;  // of a cache: the rows that are seen, 0 for all
};

struct Segment {
  std::string name;
  std::string device;
  bool is_static;    // a method for each size, named segment@size
  bool per_worker;   // each worker has an instance of its own
  bool loads_alone;  // its backend must not load two methods at once
  int group;         // of scratch memory; -1: its own
  bool each_row;     // it takes one row, and a call runs it for each row of a chunk: a recurrence
  uint64_t weight_bytes;
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

/// The texts that a chat template puts around a prompt, which it may strip of white space first.
struct Chat {
  std::string before;
  std::string behind;
  bool strips;
};

struct RunFile {
  std::string name;
  int64_t program_bytes;
  std::string program_sha256;
  std::vector<uint64_t> program_digests;  // of its chunks
  uint64_t weight_bytes;                  // of all segments, those that are not run here as well
  std::string tokenizer_digest;           // "": there is no tokenizer.json
  int vocab_size;
  int max_context;
  int rotary_border;  // a text of more tokens has LongRoPE's long frequencies; 0: none has
  std::vector<int> eos_token_ids;
  bool has_template;         // of chats
  std::optional<Chat> chat;  // none for a template that does more than to put texts around
  std::vector<Value> values;
  std::vector<Segment> segments;
  std::vector<Call> calls;
  std::vector<int> slot_of;  // of each value; -1: none
  std::vector<int64_t> slot_row_bytes;
  int output;
  scheduling::Outline outline;
  scheduling::Machine machine;
};

/// Reads and checks a program folder's run.json. Throws Error where it is missing or damaged.
RunFile read_run_file(const std::filesystem::path& folder);

/// Throws Error unless tokenizer.json is the one that the program was compiled with.
void check_tokenizer(const std::filesystem::path& path, const RunFile& file);

}  // namespace doubleweave::runner

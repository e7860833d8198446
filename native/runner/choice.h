// How a prompt is run, and how it is cut into chunks: what choice.py and chunks.py say, on
// run.json.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "run_file.h"

namespace doubleweave::runner {

/// Consecutive tokens; a static segment computes `compiled_size` rows, the last of them padding.
struct Chunk {
  int start;
  int num_tokens;
  int compiled_size;
};

/// What the user asks for; "auto" chooses all the rest by itself.
struct Wish {
  std::string schedule = "auto";
  std::vector<std::string> workers;  // empty: by the schedule
  std::optional<int> chunk;
  int threads = 1;  // in all
};

/// Throws Error for a schedule or a device that does not exist, and what "auto"
/// chooses by itself.
void check_wish(const RunFile& file, const Wish& wish);

/// The choice for a prompt of that many tokens.
Choice choose(const RunFile& file, const Wish& wish, int num_tokens);

/// Cuts a prompt as the choice says.
std::vector<Chunk> cut(const RunFile& file, const Choice& choice, int num_tokens);

}  // namespace doubleweave::runner

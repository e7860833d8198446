// The command line of doubleweave-run.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "doubleweave/scheduling/choice.h"

namespace doubleweave::runner {

struct Arguments {
  std::string folder;
  std::optional<std::string> prompt;     // "-": standard input
  std::optional<std::string> token_ids;  // a file
  int num = 128;
  scheduling::Wish wish;  // its threads are 0 where none were given
  bool is_raw = false;
  std::optional<std::string> trace;
  bool as_json = false;
  bool shows_schedule = false;
  bool only_tokenizes = false;
  bool only_detokenizes = false;
  bool shows_help = false;
  bool shows_version = false;
};

std::string usage();

/// Throws Error for an option that does not exist, misses its value, or has a wrong one.
Arguments parse_arguments(const std::vector<std::string>& words);

}  // namespace doubleweave::runner

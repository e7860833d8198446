#include "arguments.h"

#include <charconv>
#include <map>
#include <sstream>

#include "doubleweave/error.h"

namespace doubleweave::runner {

namespace {

const std::string kHelp = " (see doubleweave-run --help)";

const std::map<std::string, bool Arguments::*> kFlags{
    {"--raw", &Arguments::is_raw},
    {"--json", &Arguments::as_json},
    {"--show-schedule", &Arguments::shows_schedule},
    {"--tokenize", &Arguments::only_tokenizes},
    {"--detokenize", &Arguments::only_detokenizes},
    {"-h", &Arguments::shows_help},
    {"--help", &Arguments::shows_help},
    {"--version", &Arguments::shows_version}};

int number_of(const std::string& option, const std::string& text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  require(error == std::errc() && end == text.data() + text.size() && number >= 1, option,
          ": found '", text, "', expected a number from 1 on", kHelp);
  return number;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.push_back(part);
  }
  return parts;
}

}  // namespace

std::string usage() {
  return R"(usage: doubleweave-run [options] DIR

Generate text with a program folder made by doubleweave compile. Needs no Python.

options:
  -p, --prompt PROMPT   the prompt; - reads it from standard input
  --token-ids FILE      the prompt as a JSON list of token ids
  -n, --num NUM         most new tokens (default 128)
  --schedule NAME       auto (default), sequential, lockstep, pipelined, out_of_order or wavefront
  --threads N           threads in all (default: the machine's cores)
  --workers D,D         the workers' devices, such as npu,cpu or any,any (default: by the schedule)
  --chunk N             the most tokens of a chunk (default: the program's)
  --raw                 give the prompt as it is, without the chat template
  --trace FILE          write what ran where in the prefill: .json, for ui.perfetto.dev
  --show-schedule       print the prefill's schedule, a line a worker
  --tokenize            print the prompt's token ids as a JSON list, and nothing else
  --detokenize          print the prompt's text as a JSON list, token by token, and nothing else
  --json                print the report as one JSON object on the last line
  --version             print the version
  -h, --help            show this help
)";
}

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments found;
  found.wish.threads = 0;
  bool has_folder = false;
  for (size_t i = 0; i < words.size(); ++i) {
    std::string word = words[i];
    std::optional<std::string> joined;
    if (word.starts_with("--") && word.find('=') != std::string::npos) {
      joined = word.substr(word.find('=') + 1);
      word.resize(word.find('='));
    }
    const auto value = [&] {
      if (joined) {
        return *joined;
      }
      require(i + 1 < words.size(), word, ": expected a value", kHelp);
      return words[++i];
    };
    if (const auto flag = kFlags.find(word); flag != kFlags.end()) {
      require(!joined, word, ": takes no value", kHelp);
      found.*flag->second = true;
    } else if (word == "-p" || word == "--prompt") {
      found.prompt = value();
    } else if (word == "--token-ids") {
      found.token_ids = value();
    } else if (word == "-n" || word == "--num") {
      found.num = number_of("num", value());
    } else if (word == "--schedule") {
      found.wish.schedule = value();
    } else if (word == "--threads") {
      found.wish.threads = number_of("threads", value());
    } else if (word == "--workers") {
      found.wish.workers = split(value());
    } else if (word == "--chunk") {
      found.wish.chunk = number_of("chunk", value());
    } else if (word == "--trace") {
      found.trace = value();
    } else if (word.starts_with('-') && word != "-") {
      throw Error(word + ": is no option" + kHelp);
    } else if (has_folder) {
      throw Error("found '" + found.folder + "' and '" + word + "', expected one program folder" +
                  kHelp);
    } else {
      found.folder = word;
      has_folder = true;
    }
  }
  require(has_folder || found.shows_help || found.shows_version, "expected a program folder",
          kHelp);
  return found;
}

}  // namespace doubleweave::runner

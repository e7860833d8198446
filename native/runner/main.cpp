// doubleweave-run: text from a program folder, without Python.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "arguments.h"
#include "doubleweave/crash.h"
#include "doubleweave/error.h"
#include "doubleweave/threads.h"
#include "doubleweave/utf8.h"
#include "generate.h"
#include "trace.h"

namespace {

using doubleweave::Error;
using doubleweave::require;
using Json = nlohmann::json;
namespace runner = doubleweave::runner;

constexpr int kExitError = 2;

std::vector<int64_t> read_ids(const std::string& path) {
  std::ifstream stream(path);
  require(stream.is_open(), path, ": cannot be read");
  try {
    const Json found = Json::parse(stream);
    if (found.is_array() &&
        std::ranges::all_of(found, [](const Json& item) { return item.is_number_integer(); })) {
      return found.get<std::vector<int64_t>>();
    }
  } catch (const Json::exception&) {
    // said below
  }
  throw Error(path + ": is not a JSON list of token ids, such as [1, 2, 3]");
}

// Line ends as Python reads them: \n alone.
std::string read_text(std::istream& stream) {
  std::string text;
  bool was_return = false;
  for (std::istreambuf_iterator<char> at(stream), end; at != end; ++at) {
    if (!(was_return && *at == '\n')) {
      text += *at == '\r' ? '\n' : *at;
    }
    was_return = *at == '\r';
  }
  return text;
}

std::vector<int64_t> prompt_ids(const runner::Arguments& args, const runner::RunFile& file,
                                const doubleweave::Tokenizer* tokenizer) {
  require(args.prompt.has_value() != args.token_ids.has_value(),
          "prompt: give either -p PROMPT or --token-ids FILE");
  if (args.token_ids) {
    return read_ids(*args.token_ids);
  }
  std::string prompt = *args.prompt;
  if (prompt == "-") {
    prompt = read_text(std::cin);
  }
  require(!prompt.empty(), "prompt: found an empty text, expected at least one character");
  if (args.is_raw || !file.has_template) {
    return tokenizer->encode(prompt, true);
  }
  require(
      file.chat.has_value(),
      "prompt: the model's chat template does more than to put texts around it, which is not "
      "done here; give the prompt raw (--raw) or as token ids (--token-ids), or use doubleweave "
      "run");
  if (file.chat->strips) {
    prompt = std::string(doubleweave::utf8::stripped(prompt));
  }
  return tokenizer->encode(file.chat->before + prompt + file.chat->behind, false);
}

// The text that each token makes certain, and the rest, as text is shown.
void print_pieces(const std::vector<int64_t>& ids, const doubleweave::Tokenizer* tokenizer) {
  require(tokenizer != nullptr, "detokenize: the program has no tokenizer for it");
  doubleweave::Tokenizer::Stream stream(*tokenizer);
  Json pieces = Json::array();
  for (const int64_t id : ids) {
    pieces.push_back(stream.push(id));
  }
  pieces.push_back(stream.finish());
  std::printf("%s\n", pieces.dump().c_str());
}

void print_report(const runner::Arguments& args, const runner::Generation& result, int threads) {
  std::printf("prompt %zu tokens, %zu new; ended by %s\n", result.prompt_tokens,
              result.token_ids.size(), result.finish.c_str());
  std::printf("first token after %.0f ms; prefill %.0f tokens/s, decode ", result.ttft_s * 1e3,
              result.prefill_tok_per_s);
  if (result.decode_tok_per_s) {
    std::printf("%.1f tokens/s\n", *result.decode_tok_per_s);
  } else {
    std::printf("- tokens/s\n");
  }
  std::printf("schedule %s, %d threads; KV cache peak %.1f MiB\n", args.wish.schedule.c_str(),
              threads, static_cast<double>(result.kv_bytes_peak) / (1 << 20));
  if (args.as_json) {
    const Json report{
        {"text", result.text ? Json(*result.text) : Json()},
        {"token_ids", result.token_ids},
        {"prompt_tokens", result.prompt_tokens},
        {"new_tokens", result.token_ids.size()},
        {"ttft_s", result.ttft_s},
        {"prefill_tok_per_s", result.prefill_tok_per_s},
        {"decode_tok_per_s", result.decode_tok_per_s ? Json(*result.decode_tok_per_s) : Json()},
        {"kv_bytes_peak", result.kv_bytes_peak},
        {"schedule", args.wish.schedule},
        {"threads", threads},
        {"finish", result.finish}};
    std::printf("%s\n", report.dump().c_str());
  }
}

void run(runner::Arguments args) {
  const std::filesystem::path folder = args.folder;
  const runner::RunFile file = runner::read_run_file(folder);
  doubleweave::scheduling::Planner planner(file.outline, file.machine);
  if (args.wish.threads == 0) {
    args.wish.threads =
        planner.default_threads(doubleweave::pool_threads(), doubleweave::max_threads());
  }
  doubleweave::scheduling::check_wish(args.wish, file.outline.devices);
  require(args.wish.threads <= doubleweave::max_threads(), "threads: found ", args.wish.threads,
          ", expected 1 to ", doubleweave::max_threads(), " (the cores of this machine)");
  if (args.trace) {
    runner::check_trace_path(*args.trace);
  }
  const std::filesystem::path tokenizer_path = folder / "tokenizer.json";
  std::unique_ptr<doubleweave::Tokenizer> tokenizer;
  if (args.prompt || std::filesystem::exists(tokenizer_path)) {
    runner::check_tokenizer(tokenizer_path, file);
    try {
      tokenizer = std::make_unique<doubleweave::Tokenizer>(tokenizer_path);
    } catch (const Error& error) {
      if (args.prompt) {
        throw;
      }
      std::fprintf(stderr, "doubleweave-run: %s; the answer comes as token ids\n", error.what());
    }
  }
  const std::vector<int64_t> ids = prompt_ids(args, file, tokenizer.get());
  if (args.only_detokenizes) {
    print_pieces(ids, tokenizer.get());
    return;
  }
  if (args.only_tokenizes) {
    std::printf("%s\n", Json(ids).dump().c_str());
    return;
  }
  doubleweave::set_pool_threads(args.wish.threads);
  runner::Session session(folder, file, planner, args.wish);
  doubleweave::Timeline timeline;
  std::string schedule;
  const auto show = [](const std::string& piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };
  const auto after_prefill = [&] {
    if (args.trace) {
      runner::write_trace(*args.trace, file, session.last(), timeline);
    }
    if (args.shows_schedule) {
      schedule = runner::schedule_text(file, session.last());
    }
  };
  const runner::Generation result =
      runner::generate(session, file, ids, args.num, tokenizer.get(), show,
                       args.trace ? &timeline : nullptr, after_prefill);
  if (!result.text) {
    std::printf("%s", Json(result.token_ids).dump().c_str());
  }
  std::printf("\n\n%s", schedule.c_str());
  if (args.trace) {
    std::printf("trace written to %s\n", args.trace->c_str());
  }
  print_report(args, result, args.wish.threads);
}

int fail(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "doubleweave-run: %s\n", message.c_str());
  return kExitError;
}

}  // namespace

int main(int argc, char** argv) {
#ifndef __SANITIZE_ADDRESS__  // that says more
  doubleweave::say_crashes(kExitError);
#endif
  try {
    const runner::Arguments args = runner::parse_arguments({argv + 1, argv + argc});
    if (args.shows_help) {
      std::printf("%s", runner::usage().c_str());
    } else if (args.shows_version) {
      std::printf("doubleweave-run %s\n", DOUBLEWEAVE_VERSION);
    } else {
      run(args);
    }
    return std::fflush(stdout) == 0 ? 0 : fail("the output cannot be written");
  } catch (const std::bad_alloc&) {
    return fail("not enough memory; use a smaller model or a shorter prompt");
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}

#include "generate.h"

#include <algorithm>
#include <chrono>

namespace doubleweave::runner {

namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

Generation generate(Session& session, const RunFile& file, const std::vector<int64_t>& prompt,
                    int num, const Tokenizer* tokenizer,
                    const std::function<void(const std::string&)>& on_text, Timeline* timeline,
                    const std::function<void()>& after_prefill) {
  Generation result{};
  result.prompt_tokens = prompt.size();
  result.finish = "length";
  std::optional<Tokenizer::Stream> stream;
  if (tokenizer != nullptr) {
    stream.emplace(*tokenizer);
    result.text.emplace();
  }
  const auto show = [&](const std::string& piece) {
    if (!piece.empty()) {
      *result.text += piece;
      on_text(piece);
    }
  };
  const auto start = Clock::now();
  auto first = start;
  auto decode_from = start;
  auto last = start;
  std::span<const float> logits = session.append(prompt, timeline);
  for (int count = 0; count < num; ++count) {
    const int64_t token = std::ranges::max_element(logits) - logits.begin();
    last = Clock::now();
    if (count == 0) {
      first = last;
      after_prefill();
      last = decode_from = Clock::now();
    }
    if (std::ranges::find(file.eos_token_ids, token) != file.eos_token_ids.end()) {
      result.finish = "end";
      break;
    }
    result.token_ids.push_back(token);
    if (stream) {
      show(stream->push(token));
    }
    if (count + 1 < num) {
      if (session.length() == file.max_context) {
        result.finish = "context";
        break;
      }
      logits = session.append({&result.token_ids.back(), 1});
    }
  }
  if (stream) {
    show(stream->finish());
  }
  result.ttft_s = seconds(start, first);
  result.prefill_tok_per_s = static_cast<double>(prompt.size()) / result.ttft_s;
  if (result.token_ids.size() > 1 && last > decode_from) {
    result.decode_tok_per_s =
        static_cast<double>(result.token_ids.size() - 1) / seconds(decode_from, last);
  }
  result.kv_bytes_peak = session.kv_bytes_peak();
  return result;
}

}  // namespace doubleweave::runner

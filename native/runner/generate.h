// Greedy text: a prompt, then its own tokens, until an end token.
#pragma once

#include "doubleweave/tokenizer.h"
#include "session.h"

namespace doubleweave::runner {

/// As Generation of the Python package.
struct Generation {
  std::optional<std::string> text;  // none without a tokenizer
  std::vector<int64_t> token_ids;
  size_t prompt_tokens;
  double ttft_s;
  double prefill_tok_per_s;
  std::optional<double> decode_tok_per_s;
  size_t kv_bytes_peak;
  std::string finish;  // "length", "end" or "context"
};

/// `on_text` gets the text piece by piece; `timeline` the prefill; `after_prefill` is called behind
/// it. Errors are those of Session::append.
Generation generate(Session& session, const RunFile& file, const std::vector<int64_t>& prompt,
                    int num, const Tokenizer* tokenizer,
                    const std::function<void(const std::string&)>& on_text, Timeline* timeline,
                    const std::function<void()>& after_prefill);

}  // namespace doubleweave::runner

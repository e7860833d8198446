// Texts to tokens and back, by a tokenizer.json as Hugging Face's tokenizers write it.
//
// Knows nothing of programs, ExecuTorch or schedules; it is linked by itself.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace doubleweave {

/// BPE and unigrams, with the normalizers, pre-tokenizers and decoders of the Llama, Qwen, Gemma,
/// Mistral and SmolLM families. A file that names another step is refused.
class Tokenizer {
 public:
  /// Throws Error for a file that is missing, damaged, or names a step that does not exist here.
  explicit Tokenizer(const std::filesystem::path& path);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// Token ids, with those that the file puts around every text (such as the beginning's) if
  /// `with_special`. Throws Error for a text that is not UTF-8, or that a step cannot do.
  std::vector<int64_t> encode(std::string_view text, bool with_special) const;

  class Stream;

  /// The text of tokens. Special tokens and ids without a token are left out.
  std::string decode(std::span<const int64_t> ids) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

/// Turns the tokens of one text into text as they come, in whole characters; the pieces joined are
/// Tokenizer::decode of all of them. A token takes time that does not depend on how many came
/// before.
class Tokenizer::Stream {
 public:
  /// The tokenizer has to live as long.
  explicit Stream(const Tokenizer& tokenizer);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// The text that no later token can change, after one more.
  std::string push(int64_t id);
  /// The text that push held back.
  std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace doubleweave

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

  /// The text of tokens. Special tokens and ids without a token are left out.
  std::string decode(std::span<const int64_t> ids) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace doubleweave

// Texts to tokens and back, by a tokenizer.json as Hugging Face's tokenizers write it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text_steps.h"
#include "vocabulary.h"

namespace doubleweave::runner {

/// BPE and unigrams, with the steps of text_steps.h; what else a file may name is refused.
class Tokenizer {
 public:
  /// Throws Error for a file that is missing, damaged, or needs what there is not.
  explicit Tokenizer(const std::filesystem::path& path);

  /// Token ids, with those that the file puts around every text (such as the beginning's) if
  /// `with_special`. Throws Error for a text that is not UTF-8, or that a step cannot do.
  std::vector<int64_t> encode(std::string_view text, bool with_special) const;

  /// The text of tokens, special ones left out.
  std::string decode(std::span<const int64_t> ids) const;

 private:
  struct Added {
    std::string text;
    int64_t id;
    bool is_special;
    bool strips_left;
    bool strips_right;
  };
  /// Added tokens of one kind: those found in a text as it is, or once it is normalized.
  using AddedTokens = std::map<std::string, Added, std::greater<>>;

  void read(const nlohmann::json& data);
  void read_added(const nlohmann::json& tokens);
  void read_around(const nlohmann::json& step);
  template <typename Rest>
  void cut_out(const AddedTokens& tokens, std::string_view text, std::vector<int64_t>& ids,
               Rest rest) const;

  std::unique_ptr<Vocabulary> vocabulary_;
  std::vector<std::string> texts_;
  std::set<int64_t> special_;
  AddedTokens raw_;
  AddedTokens normalized_;
  std::vector<int64_t> before_;
  std::vector<int64_t> behind_;
  Normalize normalize_;
  Cut pre_tokenize_;
  Decode decode_;
};

}  // namespace doubleweave::runner

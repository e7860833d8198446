// The model in a tokenizer.json: byte pairs (BPE) or unigrams.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace doubleweave::tokenizer {

class Vocabulary {
 public:
  virtual ~Vocabulary() = default;
  /// The tokens of one piece of text.
  virtual void append_ids(std::string_view piece, std::vector<int64_t>& ids) const = 0;
  /// Every token's text, by its id.
  virtual std::vector<std::string> texts() const = 0;
};

/// Throws Error unless a token may have this id.
void check_id(int64_t id);

/// The model of a tokenizer.json. Throws Error that names the type or option that is not known.
std::unique_ptr<Vocabulary> read_vocabulary(const nlohmann::json& model);

}  // namespace doubleweave::tokenizer

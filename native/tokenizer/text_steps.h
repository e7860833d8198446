// The steps that tokenizer.json names around its model: normalizers, pre-tokenizers, decoders.
//
// Each is a function made from its JSON object once, and named as in Hugging Face's tokenizers.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "regex.h"

namespace doubleweave::tokenizer {

using Normalize = std::function<std::string(std::string)>;
/// Cuts a piece into pieces; `is_first` says that the piece begins the text.
using PreTokenize = std::function<std::vector<std::string>(std::string piece, bool is_first)>;

/// One step of a decoder over the tokens of one text, which come one by one.
class DecodeStep {
 public:
  virtual ~DecodeStep() = default;
  /// Takes a token and gives the tokens that it makes certain.
  virtual std::vector<std::string> push(std::string token) = 0;
  /// Gives the tokens that were held back.
  virtual std::vector<std::string> finish() { return {}; }
};

/// The steps of a decoder, each as a function that makes it anew for another text.
using Decoder = std::vector<std::function<std::unique_ptr<DecodeStep>()>>;

/// The steps of a Sequence, one behind the other.
template <typename Step>
Step read_sequence(const nlohmann::json& items, Step (*read)(const nlohmann::json&)) {
  std::vector<Step> steps;
  for (const nlohmann::json& item : items) {
    steps.push_back(read(item));
  }
  return [steps](auto value) {
    for (const Step& step : steps) {
      value = step(std::move(value));
    }
    return value;
  };
}

/// The step for a JSON object of tokenizer.json, null included. Throws Error that names a step, or
/// an option of one, that does not exist here.
Normalize read_normalizer(const nlohmann::json& step);
PreTokenize read_pre_tokenizer(const nlohmann::json& step);
Decoder read_decoder(const nlohmann::json& step);

/// The pattern of a Split or Replace: a regular expression, or a text that stands for itself.
Regex read_pattern(const nlohmann::json& pattern);

/// What Metaspace puts in the place of a space, as SentencePiece does.
inline constexpr const char* kMetaspace = "▁";

}  // namespace doubleweave::tokenizer

// The steps that tokenizer.json names around its model: normalizers, pre-tokenizers, decoders.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace doubleweave::runner {

using Normalize = std::function<std::string(std::string)>;
/// Cuts a piece into pieces; `is_first` says that it begins the text.
using Cut = std::function<std::vector<std::string>(std::string piece, bool is_first)>;
/// From tokens to pieces of text, which joined are the text.
using Decode = std::function<std::vector<std::string>(std::vector<std::string>)>;

/// The step for a JSON object of tokenizer.json, null included. Throws Error that names a kind of
/// step, or an option of one, that there is none for.
Normalize normalizer_of(const nlohmann::json& step);
Cut pre_tokenizer_of(const nlohmann::json& step);
Decode decoder_of(const nlohmann::json& step);

}  // namespace doubleweave::runner

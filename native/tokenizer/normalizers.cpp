#include <algorithm>
#include <utility>

#include "doubleweave/error.h"
#include "nfc.h"
#include "text_steps.h"

namespace doubleweave::tokenizer {

namespace {

using Json = nlohmann::json;

// ASCII is in all four forms. Only NFC has a quick check that most texts of most languages pass.
std::string only_composed(std::string text, const std::string& form) {
  const bool is_ascii =
      std::ranges::all_of(text, [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  require(is_ascii || (form == "NFC" && is_surely_nfc(text)),
          "prompt: the tokenizer puts texts into Unicode's ", form,
          ", which this one may not be in and which is not done here; give it as token ids");
  return text;
}

std::string strip(std::string text, bool left, bool right) {
  static const Regex kSpaces(R"(\s+)");
  const auto found = kSpaces.find(text);
  if (right && !found.empty() && found.back().second == text.size()) {
    text.resize(found.back().first);
  }
  if (left && !found.empty() && found.front().first == 0) {
    text.erase(0, std::min(found.front().second, text.size()));
  }
  return text;
}

// SentencePiece's map of characters comes as a trie in base64. The maps in use (nmt_nfkc and its
// kin) leave printed ASCII as it is.
std::string only_printed_ascii(std::string text) {
  require(std::ranges::all_of(text, [](char c) { return c >= 0x20 && c <= 0x7E; }),
          "prompt: the tokenizer maps characters, which is done here for printed ASCII alone; give "
          "it as token ids");
  return text;
}

}  // namespace

Regex read_pattern(const Json& pattern) {
  if (pattern.contains("Regex")) {
    return Regex(pattern.at("Regex").get<std::string>());
  }
  return Regex(Regex::literal(pattern.at("String").get<std::string>()));
}

Normalize read_normalizer(const Json& step) {
  if (step.is_null()) {
    return [](std::string text) { return text; };
  }
  const auto type = step.at("type").get<std::string>();
  if (type == "Sequence") {
    return read_sequence(step.at("normalizers"), &read_normalizer);
  }
  if (type == "Prepend") {  // SentencePiece's dummy prefix: nothing before an empty text
    return [with = step.at("prepend").get<std::string>()](std::string text) {
      return text.empty() ? text : with + text;
    };
  }
  if (type == "Replace") {
    return [pattern = read_pattern(step.at("pattern")),
            with = step.at("content").get<std::string>()](std::string text) {
      return pattern.replace(text, with);
    };
  }
  if (type == "Strip") {
    return [left = step.at("strip_left").get<bool>(), right = step.at("strip_right").get<bool>()](
               std::string text) { return strip(std::move(text), left, right); };
  }
  if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    return [type](std::string text) { return only_composed(std::move(text), type); };
  }
  if (type == "Precompiled") {
    return only_printed_ascii;
  }
  throw Error("normalizer '" + type + "'");
}

}  // namespace doubleweave::tokenizer

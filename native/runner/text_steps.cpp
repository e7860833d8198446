#include "text_steps.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <utility>

#include "doubleweave/error.h"
#include "regex.h"
#include "utf8.h"

namespace doubleweave::runner {

namespace {

using Json = nlohmann::json;

const std::string kMetaspace = "▁";
// What GPT-2 splits a text at.
const std::string kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

[[noreturn]] void refuse(const std::string& what, const std::string& found) {
  throw Error(what + " '" + found + "'");
}

std::string type_of(const Json& step) { return step.at("type").get<std::string>(); }

Regex pattern_of(const Json& pattern) {
  if (pattern.contains("Regex")) {
    return Regex(pattern.at("Regex").get<std::string>());
  }
  return Regex(Regex::literal(pattern.at("String").get<std::string>()));
}

std::string replaced(const Regex& pattern, const std::string& text, const std::string& with) {
  std::string result;
  size_t at = 0;
  for (const auto& [begin, end] : pattern.find(text)) {
    result += text.substr(at, begin - at) + with;
    at = end;
  }
  return result + text.substr(at);
}

// Bytes as letters that can be seen: GPT-2's table.
const std::array<std::string, 256>& letters_of_bytes() {
  static const auto kTable = [] {
    std::array<std::string, 256> table;
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool is_seen = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
      table[byte] = to_utf8(is_seen ? byte : next++);
    }
    return table;
  }();
  return kTable;
}

struct Composing {
  uint32_t first;
  uint32_t last;
  int combining_class;
  bool passes;
};

// Unicode's quick check for NFC: whether a text surely is composed (it may be one and fail).
bool is_composed(const std::string& text) {
  static constexpr Composing kTable[] = {
#include "nfc_table.inc"
  };
  int before = 0;
  for (const std::string_view character : characters(text)) {
    const uint32_t c = code_point(character);
    const auto* found =
        std::upper_bound(std::begin(kTable), std::end(kTable), c,
                         [](uint32_t number, const Composing& row) { return number < row.first; });
    const bool is_listed = found != std::begin(kTable) && c <= found[-1].last;
    const int combining_class = is_listed ? found[-1].combining_class : 0;
    if ((is_listed && !found[-1].passes) || (combining_class != 0 && combining_class < before)) {
      return false;
    }
    before = combining_class;
  }
  return true;
}

std::string only_composed(std::string text, const std::string& form) {
  const bool is_ascii = std::all_of(text.begin(), text.end(),
                                    [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  if (!is_ascii && !(form == "NFC" && is_composed(text))) {
    throw Error("prompt: the tokenizer puts texts into Unicode's " + form +
                ", which this one may not be in and which is not done here; give it as token ids");
  }
  return text;
}

std::string stripped(std::string text, bool left, bool right) {
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

// As tokenizers' Split: what becomes of the matches, and of the text between them.
std::vector<std::string> split(const Regex& pattern, const std::string& piece,
                               const std::string& behavior, bool is_inverted) {
  struct Span {
    size_t begin;
    size_t end;
    bool is_match;
  };
  std::vector<Span> spans;
  size_t at = 0;
  for (const auto& [begin, end] : pattern.find(piece)) {
    if (begin > at) {
      spans.push_back({at, begin, is_inverted});
    }
    if (end > begin) {
      spans.push_back({begin, end, !is_inverted});
    }
    at = end;
  }
  if (at < piece.size()) {
    spans.push_back({at, piece.size(), is_inverted});
  }
  std::vector<Span> kept;
  for (size_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans[i];
    const bool after_other = i > 0 && !spans[i - 1].is_match;
    if (behavior == "Removed" && span.is_match) {
      continue;
    }
    if (!kept.empty() &&
        ((behavior == "MergedWithPrevious" && span.is_match && after_other) ||
         (behavior == "MergedWithNext" && !span.is_match && spans[i - 1].is_match) ||
         (behavior == "Contiguous" && span.is_match == spans[i - 1].is_match))) {
      kept.back().end = span.end;
    } else {
      kept.push_back(span);
    }
  }
  std::vector<std::string> pieces;
  for (const Span& span : kept) {
    pieces.push_back(piece.substr(span.begin, span.end - span.begin));
  }
  return pieces;
}

Cut byte_level(const Json& step) {
  const bool adds_space = step.value("add_prefix_space", true);
  const bool splits = step.value("use_regex", true);
  return [adds_space, splits, pattern = Regex(kByteLevelPattern)](std::string piece, bool) {
    if (adds_space && !piece.starts_with(' ')) {
      piece = " " + piece;
    }
    std::vector<std::string> pieces =
        splits ? split(pattern, piece, "Isolated", false) : std::vector<std::string>{piece};
    for (std::string& one : pieces) {
      std::string letters;
      for (const char byte : one) {
        letters += letters_of_bytes()[static_cast<unsigned char>(byte)];
      }
      one = std::move(letters);
    }
    return pieces;
  };
}

Cut metaspace(const Json& step) {
  const std::string mark = step.value("replacement", kMetaspace);
  const std::string scheme = step.value("prepend_scheme", "always");
  const bool splits = step.value("split", true);
  if (characters(mark).size() != 1) {
    refuse("pre-tokenizer Metaspace with replacement", mark);
  }
  return [mark, scheme, splits, space = Regex(" ")](std::string piece, bool is_first) {
    piece = replaced(space, piece, mark);
    if ((scheme == "always" || (scheme == "first" && is_first)) && !piece.starts_with(mark)) {
      piece = mark + piece;
    }
    std::vector<std::string> pieces;
    size_t at = 0;
    while (splits && at < piece.size()) {
      const size_t next = piece.find(mark, at + 1);
      if (next == std::string::npos) {
        break;
      }
      pieces.push_back(piece.substr(at, next - at));
      at = next;
    }
    if (at < piece.size()) {
      pieces.push_back(piece.substr(at));
    }
    return pieces;
  };
}

Decode byte_fallback() {
  return [](std::vector<std::string> tokens) {
    std::vector<std::string> pieces;
    std::string bytes;
    const auto flush = [&] {
      if (bytes.empty()) {
        return;
      }
      if (is_utf8(bytes)) {
        pieces.push_back(bytes);
      } else {
        pieces.insert(pieces.end(), bytes.size(), "\xEF\xBF\xBD");
      }
      bytes.clear();
    };
    for (std::string& token : tokens) {
      if (token.size() == 6 && token.starts_with("<0x") && token.back() == '>' &&
          token.find_first_not_of("0123456789ABCDEFabcdef", 3) == 5) {
        bytes += static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16));
        continue;
      }
      flush();
      pieces.push_back(std::move(token));
    }
    flush();
    return pieces;
  };
}

Decode byte_level_decoder() {
  std::map<std::string, char, std::less<>> bytes;
  for (size_t byte = 0; byte < 256; ++byte) {
    bytes[letters_of_bytes()[byte]] = static_cast<char>(byte);
  }
  return [bytes](std::vector<std::string> tokens) {
    std::string text;
    for (const std::string& token : tokens) {
      std::string found;
      bool is_known = true;
      for (const std::string_view letter : characters(token)) {
        const auto place = bytes.find(letter);
        is_known = is_known && place != bytes.end();
        found += is_known ? place->second : '\0';
      }
      text += is_known ? found : token;  // a token that is no letters of bytes is its own text
    }
    return std::vector<std::string>{lossy(text)};
  };
}

Decode strip_decoder(const Json& step) {
  const std::string content = step.at("content");
  const int start = step.at("start");
  const int stop = step.at("stop");
  return [content, start, stop](std::vector<std::string> tokens) {
    for (std::string& token : tokens) {
      for (int i = 0; i < start && token.starts_with(content); ++i) {
        token.erase(0, content.size());
      }
      for (int i = 0; i < stop && token.ends_with(content); ++i) {
        token.resize(token.size() - content.size());
      }
    }
    return tokens;
  };
}

Decode metaspace_decoder(const Json& step) {
  const bool strips = step.value("prepend_scheme", "always") != "never";
  return [strips, mark = Regex(Regex::literal(step.value("replacement", kMetaspace)))](
             std::vector<std::string> tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = replaced(mark, tokens[i], i == 0 && strips ? "" : " ");
    }
    return tokens;
  };
}

}  // namespace

Normalize normalizer_of(const Json& step) {
  if (step.is_null()) {
    return [](std::string text) { return text; };
  }
  const std::string type = type_of(step);
  if (type == "Sequence") {
    std::vector<Normalize> steps;
    for (const Json& item : step.at("normalizers")) {
      steps.push_back(normalizer_of(item));
    }
    return [steps](std::string text) {
      for (const Normalize& one : steps) {
        text = one(std::move(text));
      }
      return text;
    };
  }
  if (type == "Prepend") {
    return [with = step.at("prepend").get<std::string>()](std::string text) {
      return text.empty() ? text : with + text;
    };
  }
  if (type == "Replace") {
    return [pattern = pattern_of(step.at("pattern")), with = step.at("content").get<std::string>()](
               std::string text) { return replaced(pattern, text, with); };
  }
  if (type == "Strip") {
    return [left = step.at("strip_left").get<bool>(), right = step.at("strip_right").get<bool>()](
               std::string text) { return stripped(std::move(text), left, right); };
  }
  if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    return [type](std::string text) { return only_composed(std::move(text), type); };
  }
  if (type == "Precompiled") {  // SentencePiece's map of characters: what is printed in ASCII stays
    return [](std::string text) {
      if (std::any_of(text.begin(), text.end(), [](char c) { return c < 0x20 || c > 0x7E; })) {
        throw Error(
            "prompt: the tokenizer maps characters, which is done here for printed ASCII "
            "alone; give it as token ids");
      }
      return text;
    };
  }
  refuse("normalizer", type);
}

Cut pre_tokenizer_of(const Json& step) {
  if (step.is_null()) {
    return [](std::string piece, bool) { return std::vector<std::string>{std::move(piece)}; };
  }
  const std::string type = type_of(step);
  if (type == "Sequence") {
    std::vector<Cut> steps;
    for (const Json& item : step.at("pretokenizers")) {
      steps.push_back(pre_tokenizer_of(item));
    }
    return [steps](std::string piece, bool is_first) {
      std::vector<std::string> pieces{std::move(piece)};
      for (const Cut& one : steps) {
        std::vector<std::string> next;
        for (size_t i = 0; i < pieces.size(); ++i) {
          for (std::string& part : one(std::move(pieces[i]), is_first && i == 0)) {
            next.push_back(std::move(part));
          }
        }
        pieces = std::move(next);
      }
      return pieces;
    };
  }
  if (type == "ByteLevel") {
    return byte_level(step);
  }
  if (type == "Metaspace") {
    return metaspace(step);
  }
  if (type == "Digits") {
    const bool is_each = step.at("individual_digits");
    return [pattern = Regex(is_each ? R"(\p{N})" : R"(\p{N}+)")](std::string piece, bool) {
      return split(pattern, piece, "Isolated", false);
    };
  }
  if (type == "Split") {
    const std::string behavior = step.at("behavior");
    constexpr std::array<const char*, 5> kBehaviors{"Removed", "Isolated", "MergedWithPrevious",
                                                    "MergedWithNext", "Contiguous"};
    if (std::find(kBehaviors.begin(), kBehaviors.end(), behavior) == kBehaviors.end()) {
      refuse("pre-tokenizer Split with behavior", behavior);
    }
    return
        [pattern = pattern_of(step.at("pattern")), behavior, inverts = step.value("invert", false)](
            std::string piece, bool) { return split(pattern, piece, behavior, inverts); };
  }
  refuse("pre-tokenizer", type);
}

Decode decoder_of(const Json& step) {
  if (step.is_null()) {
    return [](std::vector<std::string> tokens) {
      for (size_t i = 1; i < tokens.size(); ++i) {
        tokens[i] = " " + tokens[i];
      }
      return tokens;
    };
  }
  const std::string type = type_of(step);
  if (type == "Sequence") {
    std::vector<Decode> steps;
    for (const Json& item : step.at("decoders")) {
      steps.push_back(decoder_of(item));
    }
    return [steps](std::vector<std::string> tokens) {
      for (const Decode& one : steps) {
        tokens = one(std::move(tokens));
      }
      return tokens;
    };
  }
  if (type == "ByteLevel") {
    return byte_level_decoder();
  }
  if (type == "ByteFallback") {
    return byte_fallback();
  }
  if (type == "Metaspace") {
    return metaspace_decoder(step);
  }
  if (type == "Strip") {
    return strip_decoder(step);
  }
  if (type == "Replace") {
    return [pattern = pattern_of(step.at("pattern")),
            with = step.at("content").get<std::string>()](std::vector<std::string> tokens) {
      for (std::string& token : tokens) {
        token = replaced(pattern, token, with);
      }
      return tokens;
    };
  }
  if (type == "Fuse") {
    return [](std::vector<std::string> tokens) {
      std::string text;
      for (const std::string& token : tokens) {
        text += token;
      }
      return std::vector<std::string>{text};
    };
  }
  refuse("decoder", type);
}

}  // namespace doubleweave::runner

#include <algorithm>
#include <array>
#include <utility>

#include "byte_letters.h"
#include "doubleweave/error.h"
#include "doubleweave/utf8.h"
#include "text_steps.h"

namespace doubleweave::tokenizer {

namespace {

using Json = nlohmann::json;

// GPT-2's: words with the space before them; spaces before a word leave it their last.
const std::string kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// As tokenizers' SplitDelimiterBehavior: Removed drops matches, Isolated makes each a piece, the
// Merged ones join a match to its neighbour (of two matches in a row only the first joins what is
// before it, and only the last what is behind it), Contiguous joins matches in a row. Inverted, the
// text between matches takes their part.
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

// Bytes become letters here, so that every text is in the vocabulary and none is unknown.
PreTokenize byte_level(const Json& step) {
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
        letters += byte_letters()[static_cast<unsigned char>(byte)];
      }
      one = std::move(letters);
    }
    return pieces;
  };
}

// Spaces become marks, and a mark begins each piece. Scheme "first" puts one before the text alone,
// not behind added tokens: what follows those is no new word.
PreTokenize metaspace(const Json& step) {
  const std::string mark = step.value("replacement", kMetaspace);
  const std::string scheme = step.value("prepend_scheme", "always");
  const bool splits = step.value("split", true);
  if (utf8::characters(mark).size() != 1) {
    throw Error("pre-tokenizer Metaspace with replacement '" + mark + "'");
  }
  return [mark, scheme, splits, space = Regex(" ")](std::string piece, bool is_first) {
    piece = space.replace(piece, mark);
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

}  // namespace

PreTokenize read_pre_tokenizer(const Json& step) {
  if (step.is_null()) {
    return [](std::string piece, bool) { return std::vector<std::string>{std::move(piece)}; };
  }
  const auto type = step.at("type").get<std::string>();
  if (type == "Sequence") {
    std::vector<PreTokenize> steps;
    for (const Json& item : step.at("pretokenizers")) {
      steps.push_back(read_pre_tokenizer(item));
    }
    return [steps](std::string piece, bool is_first) {
      std::vector<std::string> pieces{std::move(piece)};
      for (const PreTokenize& one : steps) {
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
  if (type == "Digits") {  // numbers of every script, as Rust's char::is_numeric
    const bool is_each = step.at("individual_digits");
    return [pattern = Regex(is_each ? R"(\p{N})" : R"(\p{N}+)")](std::string piece, bool) {
      return split(pattern, piece, "Isolated", false);
    };
  }
  if (type == "Split") {
    const std::string behavior = step.at("behavior");
    constexpr std::array<const char*, 5> kBehaviors{"Removed", "Isolated", "MergedWithPrevious",
                                                    "MergedWithNext", "Contiguous"};
    if (std::ranges::find(kBehaviors, behavior) == kBehaviors.end()) {
      throw Error("pre-tokenizer Split with behavior '" + behavior + "'");
    }
    return [pattern = read_pattern(step.at("pattern")), behavior,
            inverts = step.value("invert", false)](std::string piece, bool) {
      return split(pattern, piece, behavior, inverts);
    };
  }
  throw Error("pre-tokenizer '" + type + "'");
}

}  // namespace doubleweave::tokenizer

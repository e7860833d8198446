// The decoder that tokenizer.json names, one token at a time: what a step may still change is held
// back. runtime/llm/decode_steps.py has the same in Python.
#include <algorithm>
#include <map>
#include <utility>

#include "byte_letters.h"
#include "doubleweave/error.h"
#include "doubleweave/utf8.h"
#include "text_steps.h"

namespace doubleweave::tokenizer {

namespace {

using Json = nlohmann::json;
using Tokens = std::vector<std::string>;

constexpr const char* kReplacement = "\xEF\xBF\xBD";

// Changes each token by itself.
class Each : public DecodeStep {
 public:
  using Change = std::function<std::string(std::string, bool is_first)>;
  explicit Each(Change change) : change_(std::move(change)) {}

  Tokens push(std::string token) override {
    return {change_(std::move(token), std::exchange(is_first_, false))};
  }

 private:
  Change change_;
  bool is_first_ = true;
};

// Tokens <0x00> to <0xFF> in a row are the bytes of characters. Where the row is no UTF-8, each of
// them becomes a U+FFFD; so a row is known when it ends.
class ByteFallback : public DecodeStep {
 public:
  Tokens push(std::string token) override {
    if (token.size() == 6 && token.starts_with("<0x") && token.back() == '>' &&
        token.find_first_not_of("0123456789ABCDEFabcdef", 3) == 5) {
      bytes_ += static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16));
      return {};
    }
    Tokens tokens = finish();
    tokens.push_back(std::move(token));
    return tokens;
  }

  Tokens finish() override {
    const std::string row = std::exchange(bytes_, {});
    if (row.empty()) {
      return {};
    }
    return utf8::is_valid(row) ? Tokens{row} : Tokens(row.size(), kReplacement);
  }

 private:
  std::string bytes_;
};

// GPT-2's letters stand for bytes; a token with other letters is text. Gives whole characters.
class Bytes : public DecodeStep {
 public:
  Tokens push(std::string token) override {
    std::string found;
    bool is_known = true;
    for (const std::string_view letter : utf8::characters(token)) {
      const auto place = places().find(letter);
      is_known = is_known && place != places().end();
      found += is_known ? place->second : '\0';
    }
    bytes_ += is_known ? found : token;
    return give(utf8::begun(bytes_));
  }

  Tokens finish() override { return give(0); }

 private:
  static const std::map<std::string, char, std::less<>>& places() {
    static const auto kPlaces = [] {
      std::map<std::string, char, std::less<>> places;
      for (size_t byte = 0; byte < 256; ++byte) {
        places[byte_letters()[byte]] = static_cast<char>(byte);
      }
      return places;
    }();
    return kPlaces;
  }

  // All but the last `held` bytes.
  Tokens give(size_t held) {
    const size_t certain = bytes_.size() - held;
    const std::string text = utf8::lossy(std::string_view(bytes_).substr(0, certain));
    bytes_.erase(0, certain);
    return {text};
  }

  std::string bytes_;
};

// A text without up to `start` and `stop` times a content at its ends.
struct Ends {
  std::string content;
  int start;
  int stop;

  size_t begin(std::string_view text) const {
    size_t at = 0;
    for (int i = 0; i < start && text.substr(at).starts_with(content); ++i) {
      at += content.size();
    }
    return at;
  }
  size_t end(std::string_view text) const {
    size_t at = text.size();
    for (int i = 0; i < stop && text.substr(0, at).ends_with(content); ++i) {
      at -= content.size();
    }
    return at;
  }
};

// Strips one text that comes in pieces.
class StripOnce : public DecodeStep {
 public:
  explicit StripOnce(Ends ends) : ends_(std::move(ends)) {}

  Tokens push(std::string token) override {
    const size_t begin = ends_.begin(token);
    ends_.start =
        begin == token.size() ? ends_.start - static_cast<int>(begin / ends_.content.size()) : 0;
    held_ += token.substr(begin);
    std::string text = held_.substr(0, ends_.end(held_));
    held_.erase(0, text.size());
    return {text};
  }

 private:
  Ends ends_;
  std::string held_;
};

// Gives the tokens joined, at the end.
class Whole : public DecodeStep {
 public:
  Tokens push(std::string token) override {
    text_ += token;
    return {};
  }
  Tokens finish() override { return {std::exchange(text_, {})}; }

 private:
  std::string text_;
};

template <typename Step, typename... Values>
Decoder::value_type made(Values... values) {
  return [=] { return std::make_unique<Step>(values...); };
}

Ends ends_of(const Json& step) { return {step.at("content"), step.at("start"), step.at("stop")}; }

// What a step does to each token.
Each::Change change_of(const Json& step) {
  const std::string type = step.at("type");
  if (type == "Metaspace") {
    // The mark that was put before the text goes; every other one is a space.
    const bool strips = step.value("prepend_scheme", "always") != "never";
    return [strips, mark = Regex(Regex::literal(step.value("replacement", kMetaspace)))](
               const std::string& token, bool is_first) {
      return mark.replace(token, is_first && strips ? "" : " ");
    };
  }
  if (type == "Strip") {
    return [ends = ends_of(step)](const std::string& token, bool) {
      const std::string rest = token.substr(ends.begin(token));
      return rest.substr(0, ends.end(rest));
    };
  }
  if (type == "Replace") {
    return
        [pattern = read_pattern(step.at("pattern")), with = step.at("content").get<std::string>()](
            const std::string& token, bool) { return pattern.replace(token, with); };
  }
  throw Error("decoder '" + type + "'");
}

bool takes_pieces(const Json& step) {
  const std::string type = step.at("type");
  if (type == "Replace") {
    const Json& pattern = step.at("pattern");
    return pattern.contains("String") &&
           utf8::characters(pattern.at("String").get<std::string>()).size() == 1;
  }
  return type == "Fuse" || type == "ByteLevel" || type == "Strip";
}

void flatten(const Json& step, std::vector<Json>& flat) {
  if (step.at("type") == "Sequence") {
    for (const Json& item : step.at("decoders")) {
      flatten(item, flat);
    }
  } else {
    flat.push_back(step);
  }
}

}  // namespace

Decoder read_decoder(const Json& step) {
  if (step.is_null()) {  // tokens are taken for words
    return {made<Each>(
        [](const std::string& token, bool is_first) { return is_first ? token : " " + token; })};
  }
  std::vector<Json> flat;
  flatten(step, flat);
  Decoder decoder;
  bool is_joined = false;  // the tokens are pieces of one
  for (auto at = flat.begin(); at != flat.end(); ++at) {
    const std::string type = at->at("type");
    if (type == "Fuse" || type == "ByteLevel") {
      // Pieces can only go on into steps that take one text in pieces.
      is_joined = std::all_of(at + 1, flat.end(), &takes_pieces);
      if (type == "ByteLevel") {
        decoder.push_back(made<Bytes>());
      }
      if (!is_joined) {
        decoder.push_back(made<Whole>());
      }
    } else if (type == "Strip" && is_joined) {
      decoder.push_back(made<StripOnce>(ends_of(*at)));
    } else if (type == "ByteFallback") {
      decoder.push_back(made<ByteFallback>());
    } else {
      decoder.push_back(made<Each>(change_of(*at)));
    }
  }
  return decoder;
}

}  // namespace doubleweave::tokenizer

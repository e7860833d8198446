#include <map>
#include <numeric>

#include "byte_letters.h"
#include "doubleweave/error.h"
#include "doubleweave/utf8.h"
#include "text_steps.h"

namespace doubleweave::tokenizer {

namespace {

using Json = nlohmann::json;

// Tokens <0x00> to <0xFF> in a row are the bytes of characters. Where they are no UTF-8, each byte
// becomes a U+FFFD of its own (a byte-level tokenizer's make one for each broken character).
Decode byte_fallback() {
  return [](std::vector<std::string> tokens) {
    std::vector<std::string> pieces;
    std::string bytes;
    const auto flush = [&] {
      if (bytes.empty()) {
        return;
      }
      if (utf8::is_valid(bytes)) {
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

// All tokens are joined first: a character's bytes may lie in several.
Decode byte_level_decoder() {
  std::map<std::string, char, std::less<>> bytes;
  for (size_t byte = 0; byte < 256; ++byte) {
    bytes[byte_letters()[byte]] = static_cast<char>(byte);
  }
  return [bytes](std::vector<std::string> tokens) {
    std::string text;
    for (const std::string& token : tokens) {
      std::string found;
      bool is_known = true;
      for (const std::string_view letter : utf8::characters(token)) {
        const auto place = bytes.find(letter);
        is_known = is_known && place != bytes.end();
        found += is_known ? place->second : '\0';
      }
      text += is_known ? found : token;  // an added token may have other letters
    }
    return std::vector<std::string>{utf8::lossy(text)};
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

// The mark that was put before the text goes; every other one is a space.
Decode metaspace_decoder(const Json& step) {
  const bool strips = step.value("prepend_scheme", "always") != "never";
  return [strips, mark = Regex(Regex::literal(step.value("replacement", kMetaspace)))](
             std::vector<std::string> tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = mark.replace(tokens[i], i == 0 && strips ? "" : " ");
    }
    return tokens;
  };
}

}  // namespace

Decode read_decoder(const Json& step) {
  if (step.is_null()) {  // tokens are taken for words
    return [](std::vector<std::string> tokens) {
      for (size_t i = 1; i < tokens.size(); ++i) {
        tokens[i] = " " + tokens[i];
      }
      return tokens;
    };
  }
  const auto type = step.at("type").get<std::string>();
  if (type == "Sequence") {
    return read_sequence(step.at("decoders"), &read_decoder);
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
    return [pattern = read_pattern(step.at("pattern")),
            with = step.at("content").get<std::string>()](std::vector<std::string> tokens) {
      for (std::string& token : tokens) {
        token = pattern.replace(token, with);
      }
      return tokens;
    };
  }
  if (type == "Fuse") {
    return [](std::vector<std::string> tokens) {
      return std::vector<std::string>{std::accumulate(tokens.begin(), tokens.end(), std::string())};
    };
  }
  throw Error("decoder '" + type + "'");
}

}  // namespace doubleweave::tokenizer

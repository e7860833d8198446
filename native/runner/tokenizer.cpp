#include "tokenizer.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include "doubleweave/error.h"
#include "regex.h"
#include "utf8.h"

namespace doubleweave::runner {

namespace {

using Json = nlohmann::json;

const Json& member(const Json& data, const char* name) {
  static const Json kNone;
  const auto found = data.find(name);
  return found == data.end() ? kNone : *found;
}

}  // namespace

Tokenizer::Tokenizer(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    throw Error(path.string() +
                ": missing: the model came without a tokenizer; give the prompt with --token-ids");
  }
  std::ostringstream text;
  text << stream.rdbuf();
  try {
    read(Json::parse(text.str()));
  } catch (const Json::exception& error) {
    std::string reason = error.what();
    reason = reason.substr(0, std::min(reason.find('\n'), size_t{200}));
    throw Error(path.string() + ": is not a tokenizer (" + reason + "); compile the program again");
  } catch (const Error& error) {
    throw Error(
        path.string() + ": needs " + error.what() +
        " which there is not here; give the prompt with --token-ids, or use doubleweave run");
  }
}

void Tokenizer::read(const Json& data) {
  vocabulary_ = read_vocabulary(data.at("model"));
  texts_ = vocabulary_->texts();
  normalize_ = normalizer_of(member(data, "normalizer"));
  pre_tokenize_ = pre_tokenizer_of(member(data, "pre_tokenizer"));
  decode_ = decoder_of(member(data, "decoder"));
  read_added(member(data, "added_tokens"));
  read_around(member(data, "post_processor"));
  for (const char* option : {"truncation", "padding"}) {
    if (!member(data, option).is_null()) {
      throw Error(std::string(option) + ",");
    }
  }
}

void Tokenizer::read_added(const Json& tokens) {
  for (const Json& item : tokens) {
    Added token{item.at("content"), item.at("id"), item.at("special"), item.value("lstrip", false),
                item.value("rstrip", false)};
    if (item.value("single_word", false)) {
      throw Error("added tokens that are single words,");
    }
    check_id(token.id);
    if (token.id >= static_cast<int64_t>(texts_.size())) {
      texts_.resize(static_cast<size_t>(token.id) + 1);
    }
    if (token.is_special) {
      special_.insert(token.id);
    }
    const bool is_normalized = item.value("normalized", false);
    const std::string found = is_normalized ? normalize_(token.text) : token.text;
    texts_[static_cast<size_t>(token.id)] = found;
    if (!found.empty()) {
      (is_normalized ? normalized_ : raw_).emplace(found, std::move(token));
    }
  }
}

void Tokenizer::read_around(const Json& step) {
  if (step.is_null()) {
    return;
  }
  const std::string type = step.at("type");
  if (type == "Sequence") {
    for (const Json& item : step.at("processors")) {
      read_around(item);
    }
  } else if (type == "TemplateProcessing") {
    bool is_behind = false;
    for (const Json& part : step.at("single")) {
      if (part.contains("Sequence")) {
        is_behind = true;
        continue;
      }
      const std::string name = part.at("SpecialToken").at("id");
      for (const Json& id : step.at("special_tokens").at(name).at("ids")) {
        (is_behind ? behind_ : before_).push_back(id);
      }
    }
  } else if (type != "ByteLevel") {  // that one moves offsets alone
    throw Error("post-processor '" + type + "'");
  }
}

// Finds added tokens, the longest first, from left to right; `rest` gets what lies between them.
template <typename Rest>
void Tokenizer::cut_out(const AddedTokens& tokens, std::string_view text, std::vector<int64_t>& ids,
                        Rest rest) const {
  static const Regex kSpacesBehind(R"(\s+\z)");
  static const Regex kSpacesBefore(R"(\A\s+)");
  std::set<char> firsts;
  for (const auto& [content, token] : tokens) {
    firsts.insert(content[0]);
  }
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const Added* found = nullptr;
    size_t length = 0;
    if (firsts.contains(text[at])) {
      for (const auto& [content, token] : tokens) {
        if (text.substr(at).starts_with(content)) {  // longer ones come first
          found = &token;
          length = content.size();
          break;
        }
      }
    }
    if (found == nullptr) {
      ++at;
      continue;
    }
    std::string_view between = text.substr(begin, at - begin);
    if (found->strips_left) {
      if (const auto spaces = kSpacesBehind.find(between); !spaces.empty()) {
        between = between.substr(0, spaces.front().first);
      }
    }
    if (!between.empty()) {
      rest(between);
    }
    ids.push_back(found->id);
    at += length;
    if (found->strips_right) {
      if (const auto spaces = kSpacesBefore.find(text.substr(at)); !spaces.empty()) {
        at += spaces.front().second;
      }
    }
    begin = at;
  }
  if (begin < text.size()) {
    rest(text.substr(begin));
  }
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool with_special) const {
  if (!is_utf8(text)) {
    throw Error("prompt: is not valid Unicode; give it as UTF-8");
  }
  std::vector<int64_t> ids;
  if (with_special) {
    ids = before_;
  }
  cut_out(raw_, text, ids, [&](std::string_view piece) {
    const bool is_first = piece.data() == text.data();
    const std::string normal = normalize_(std::string(piece));
    cut_out(normalized_, normal, ids, [&](std::string_view part) {
      for (const std::string& one :
           pre_tokenize_(std::string(part), is_first && part.data() == normal.data())) {
        vocabulary_->append_ids(one, ids);
      }
    });
  });
  if (with_special) {
    ids.insert(ids.end(), behind_.begin(), behind_.end());
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int64_t> ids) const {
  std::vector<std::string> tokens;
  for (const int64_t id : ids) {
    if (id >= 0 && id < static_cast<int64_t>(texts_.size()) && !special_.contains(id) &&
        !texts_[static_cast<size_t>(id)].empty()) {
      tokens.push_back(texts_[static_cast<size_t>(id)]);
    }
  }
  std::string text;
  for (const std::string& piece : decode_(std::move(tokens))) {
    text += piece;
  }
  return text;
}

}  // namespace doubleweave::runner

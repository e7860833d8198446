#include "doubleweave/tokenizer.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <numeric>
#include <set>
#include <sstream>
#include <utility>

#include "added_tokens.h"
#include "doubleweave/error.h"
#include "doubleweave/utf8.h"
#include "text_steps.h"
#include "vocabulary.h"

namespace doubleweave {

namespace {

using Json = nlohmann::json;

const Json& member(const Json& data, const char* name) {
  static const Json kNone;
  const auto found = data.find(name);
  return found == data.end() ? kNone : *found;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(const Json& data);
  void read_added(const Json& tokens);
  void read_post_processor(const Json& step);

  std::unique_ptr<tokenizer::Vocabulary> vocabulary;
  std::vector<std::string> texts;  // by id
  std::set<int64_t> special;
  // Found in the text as it is, and in what lies between once it is normalized.
  tokenizer::AddedTokens raw;
  tokenizer::AddedTokens normalized;
  // Ids that are put around a text.
  std::vector<int64_t> before;
  std::vector<int64_t> behind;
  tokenizer::Normalize normalize;
  tokenizer::PreTokenize pre_tokenize;
  tokenizer::Decoder decoder;
};

Tokenizer::Impl::Impl(const Json& data)
    : vocabulary(tokenizer::read_vocabulary(data.at("model"))),
      texts(vocabulary->texts()),
      normalize(tokenizer::read_normalizer(member(data, "normalizer"))),
      pre_tokenize(tokenizer::read_pre_tokenizer(member(data, "pre_tokenizer"))),
      decoder(tokenizer::read_decoder(member(data, "decoder"))) {
  read_added(member(data, "added_tokens"));
  read_post_processor(member(data, "post_processor"));
  for (const char* option : {"truncation", "padding"}) {
    require(member(data, option).is_null(), option, ",");
  }
}

void Tokenizer::Impl::read_added(const Json& tokens) {
  for (const Json& item : tokens) {
    require(!item.value("single_word", false), "added tokens that are single words,");
    const tokenizer::AddedToken token{item.at("id"), item.value("lstrip", false),
                                      item.value("rstrip", false)};
    tokenizer::check_id(token.id);
    if (token.id >= static_cast<int64_t>(texts.size())) {
      texts.resize(static_cast<size_t>(token.id) + 1);
    }
    if (item.at("special")) {
      special.insert(token.id);
    }
    std::string text = item.at("content");
    const bool is_normalized = item.value("normalized", false);
    // A normalized one is looked for in normalized text.
    (is_normalized ? normalized : raw).add(is_normalized ? normalize(text) : text, token);
    texts[static_cast<size_t>(token.id)] = std::move(text);
  }
}

void Tokenizer::Impl::read_post_processor(const Json& step) {
  if (step.is_null()) {
    return;
  }
  const std::string type = step.at("type");
  if (type == "Sequence") {
    for (const Json& item : step.at("processors")) {
      read_post_processor(item);
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
        (is_behind ? behind : before).push_back(id);
      }
    }
  } else if (type != "ByteLevel") {  // that one moves offsets alone
    throw Error("post-processor '" + type + "'");
  }
}

Tokenizer::Tokenizer(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  require(stream.is_open(), path.string(),
          ": missing: the model came without a tokenizer; give the prompt with --token-ids");
  std::ostringstream text;
  text << stream.rdbuf();
  try {
    impl_ = std::make_unique<Impl>(Json::parse(text.str()));
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

Tokenizer::~Tokenizer() = default;

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool with_special) const {
  require(utf8::is_valid(text), "prompt: is not valid Unicode; give it as UTF-8");
  std::vector<int64_t> ids = with_special ? impl_->before : std::vector<int64_t>();
  for (const tokenizer::Part& raw : impl_->raw.cut(text)) {
    if (raw.id) {
      ids.push_back(*raw.id);
      continue;
    }
    const std::string normal = impl_->normalize(std::string(raw.text));
    for (const tokenizer::Part& part : impl_->normalized.cut(normal)) {
      if (part.id) {
        ids.push_back(*part.id);
        continue;
      }
      const bool is_first = raw.text.data() == text.data() && part.text.data() == normal.data();
      for (const std::string& piece : impl_->pre_tokenize(std::string(part.text), is_first)) {
        impl_->vocabulary->append_ids(piece, ids);
      }
    }
  }
  if (with_special) {
    ids.insert(ids.end(), impl_->behind.begin(), impl_->behind.end());
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int64_t> ids) const {
  Stream stream(*this);
  std::string text;
  for (const int64_t id : ids) {
    text += stream.push(id);
  }
  return text + stream.finish();
}

struct Tokenizer::Stream::State {
  // Sends tokens through the steps from one on, and joins what comes out.
  std::string through(std::vector<std::string> tokens, size_t start) {
    for (size_t step = start; step < steps.size(); ++step) {
      std::vector<std::string> given;
      for (std::string& token : tokens) {
        std::ranges::move(steps[step]->push(std::move(token)), std::back_inserter(given));
      }
      tokens = std::move(given);
    }
    return std::accumulate(tokens.begin(), tokens.end(), std::string());
  }

  const Tokenizer::Impl& tokenizer;
  std::vector<std::unique_ptr<tokenizer::DecodeStep>> steps;
};

Tokenizer::Stream::Stream(const Tokenizer& tokenizer)
    : state_(std::make_unique<State>(*tokenizer.impl_)) {
  for (const auto& make : state_->tokenizer.decoder) {
    state_->steps.push_back(make());
  }
}

Tokenizer::Stream::~Stream() = default;

std::string Tokenizer::Stream::push(int64_t id) {
  const Impl& found = state_->tokenizer;
  if (id < 0 || id >= static_cast<int64_t>(found.texts.size()) || found.special.contains(id) ||
      found.texts[static_cast<size_t>(id)].empty()) {
    return {};
  }
  return state_->through({found.texts[static_cast<size_t>(id)]}, 0);
}

std::string Tokenizer::Stream::finish() {
  std::string text;
  for (size_t step = 0; step < state_->steps.size(); ++step) {
    text += state_->through(state_->steps[step]->finish(), step + 1);
  }
  return text;
}

}  // namespace doubleweave

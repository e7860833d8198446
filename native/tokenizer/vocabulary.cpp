#include "vocabulary.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <optional>
#include <queue>
#include <unordered_map>
#include <utility>

#include "doubleweave/error.h"
#include "doubleweave/utf8.h"

namespace doubleweave::tokenizer {

namespace {

using Json = nlohmann::json;

// SentencePiece's name for the token of a byte, <0x00> to <0xFF>.
std::string byte_token(unsigned char byte) {
  char name[8];
  std::snprintf(name, sizeof(name), "<0x%02X>", byte);
  return name;
}

class Ids {
 public:
  void add(std::string text, int64_t id) {
    check_id(id);
    ids_.emplace(std::move(text), id);
  }

  std::optional<int64_t> of(const std::string& text) const {
    const auto found = ids_.find(text);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }

  /// The tokens of a text's bytes; none where one byte has none.
  std::vector<int64_t> of_bytes(std::string_view text) const {
    std::vector<int64_t> found;
    for (const char byte : text) {
      const auto id = of(byte_token(static_cast<unsigned char>(byte)));
      if (!id) {
        return {};
      }
      found.push_back(*id);
    }
    return found;
  }

  std::vector<std::string> texts() const {
    std::vector<std::string> found;
    for (const auto& [text, id] : ids_) {
      if (id >= static_cast<int64_t>(found.size())) {
        found.resize(static_cast<size_t>(id) + 1);
      }
      found[static_cast<size_t>(id)] = text;
    }
    return found;
  }

 private:
  std::unordered_map<std::string, int64_t> ids_;
};

struct PairHash {
  size_t operator()(const std::pair<int64_t, int64_t>& pair) const {
    return std::hash<uint64_t>()(static_cast<uint64_t>(pair.first) << 32 ^
                                 static_cast<uint64_t>(pair.second));
  }
};

// As tokenizers' BPE model: a piece starts as characters, and merges learnt earlier come first.
class BytePairs final : public Vocabulary {
 public:
  explicit BytePairs(const Json& model)
      : byte_fallback_(model.value("byte_fallback", false)),
        fuse_unknown_(model.value("fuse_unk", false)),
        ignore_merges_(model.value("ignore_merges", false)) {
    // WordPiece-like marks of a word's inner pieces; no family of the five has them.
    for (const char* option : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      const auto found = model.find(option);
      require(found == model.end() || found->is_null() || *found == "", "model BPE with ", option);
    }
    for (const auto& [text, id] : model.at("vocab").items()) {
      ids_.add(text, id);
    }
    const auto unknown = model.find("unk_token");
    if (unknown != model.end() && unknown->is_string()) {
      unknown_ = ids_.of(unknown->get<std::string>());
    }
    int64_t rank = 0;
    for (const Json& merge : model.at("merges")) {
      const auto [left, right] = parts(merge);
      const auto a = ids_.of(left);
      const auto b = ids_.of(right);
      const auto merged = ids_.of(left + right);
      require(a && b && merged, "a merge of tokens that do not exist,");
      merges_.emplace(std::pair(*a, *b), std::pair(rank++, *merged));
    }
  }

  void append_ids(std::string_view piece, std::vector<int64_t>& ids) const override {
    // Llama 3's tokens come from tiktoken, which looks a whole piece up before it merges.
    if (ignore_merges_) {
      if (const auto whole = ids_.of(std::string(piece))) {
        ids.push_back(*whole);
        return;
      }
    }
    const std::vector<int64_t> merged = merge(symbols(piece));
    ids.insert(ids.end(), merged.begin(), merged.end());
  }

  std::vector<std::string> texts() const override { return ids_.texts(); }

 private:
  // ["a", "b"], or "a b" as files before tokenizers 0.20 have it.
  static std::pair<std::string, std::string> parts(const Json& merge) {
    if (merge.is_array()) {
      return {merge.at(0), merge.at(1)};
    }
    const auto text = merge.get<std::string>();
    const size_t space = text.find(' ');
    require(space != std::string::npos, "a merge of one token,");
    return {text.substr(0, space), text.substr(space + 1)};
  }

  // A token for each character; for one without, its bytes' if all of them have one, or the unknown
  // one, of which fuse_unk keeps the first in a row. Without an unknown token it is left out.
  std::vector<int64_t> symbols(std::string_view piece) const {
    std::vector<int64_t> found;
    bool was_unknown = false;
    for (const std::string_view character : utf8::characters(piece)) {
      const auto id = ids_.of(std::string(character));
      if (id) {
        found.push_back(*id);
        was_unknown = false;
        continue;
      }
      const std::vector<int64_t> bytes =
          byte_fallback_ ? ids_.of_bytes(character) : std::vector<int64_t>();
      if (!bytes.empty()) {
        found.insert(found.end(), bytes.begin(), bytes.end());
        was_unknown = false;
      } else if (unknown_ && !(was_unknown && fuse_unknown_)) {
        found.push_back(*unknown_);
        was_unknown = true;
      }
    }
    return found;
  }

  struct Candidate {
    int64_t rank;
    int left;
    int64_t merged;
    bool operator>(const Candidate& other) const {
      return std::pair(rank, left) > std::pair(other.rank, other.left);
    }
  };

  // Merges neighbours, the pair of the lowest rank first and of equals the leftmost one. A queue
  // and a list of neighbours keep this near linear: with Llama 2's and Gemma's files a piece may be
  // the whole prompt.
  std::vector<int64_t> merge(std::vector<int64_t> ids) const {
    const int count = static_cast<int>(ids.size());
    std::vector<int> next(ids.size());
    std::vector<int> before(ids.size());
    for (int i = 0; i < count; ++i) {
      next[i] = i + 1;
      before[i] = i - 1;
    }
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    const auto consider = [&](int left) {
      if (left < 0 || next[left] >= count) {
        return;
      }
      const auto found = merges_.find({ids[left], ids[next[left]]});
      if (found != merges_.end()) {
        queue.push({found->second.first, left, found->second.second});
      }
    };
    for (int i = 0; i < count; ++i) {
      consider(i);
    }
    constexpr int64_t kGone = -1;
    while (!queue.empty()) {
      const Candidate top = queue.top();
      queue.pop();
      if (ids[top.left] == kGone || next[top.left] >= count) {
        continue;
      }
      const int right = next[top.left];
      const auto found = merges_.find({ids[top.left], ids[right]});
      if (found == merges_.end() || found->second != std::pair(top.rank, top.merged)) {
        continue;  // one of the two has been merged with another since
      }
      ids[top.left] = top.merged;
      ids[right] = kGone;
      next[top.left] = next[right];
      if (next[right] < count) {
        before[next[right]] = top.left;
      }
      consider(before[top.left]);
      consider(top.left);
    }
    std::erase(ids, kGone);
    return ids;
  }

  Ids ids_;
  std::optional<int64_t> unknown_;
  bool byte_fallback_;
  bool fuse_unknown_;
  bool ignore_merges_;
  std::unordered_map<std::pair<int64_t, int64_t>, std::pair<int64_t, int64_t>, PairHash> merges_;
};

// As tokenizers' Unigram model, which is SentencePiece's.
class Unigrams final : public Vocabulary {
 public:
  explicit Unigrams(const Json& model) : byte_fallback_(model.value("byte_fallback", false)) {
    double least = std::numeric_limits<double>::infinity();
    for (const Json& item : model.at("vocab")) {
      const std::string text = item.at(0);
      ids_.add(text, static_cast<int64_t>(scores_.size()));
      scores_.push_back(item.at(1));
      least = std::min(least, scores_.back());
      longest_ = std::max(longest_, text.size());
    }
    if (!model.at("unk_id").is_null()) {
      unknown_ = model.at("unk_id").get<int64_t>();
    }
    constexpr double kPenalty = 10.0;  // kUnkPenalty of SentencePiece's unigram_model.cc
    unknown_score_ = least - kPenalty;
  }

  // A character that is no token counts as unknown; unknown ones in a row become one unknown token,
  // or all of their bytes' tokens.
  void append_ids(std::string_view piece, std::vector<int64_t>& ids) const override {
    const std::vector<Step> best = best_steps(piece);
    std::vector<std::vector<int64_t>> reversed;
    for (size_t end = piece.size(); end > 0;) {
      size_t from = best[end].from;
      if (best[end].id) {
        reversed.push_back({*best[end].id});
      } else {
        while (from > 0 && !best[from].id) {
          from = best[from].from;
        }
        std::vector<int64_t> bytes =
            byte_fallback_ ? ids_.of_bytes(piece.substr(from, end - from)) : std::vector<int64_t>();
        if (bytes.empty() && unknown_) {
          bytes.push_back(*unknown_);
        }
        reversed.push_back(std::move(bytes));
      }
      end = from;
    }
    for (auto part = reversed.rbegin(); part != reversed.rend(); ++part) {
      ids.insert(ids.end(), part->begin(), part->end());
    }
  }

  std::vector<std::string> texts() const override { return ids_.texts(); }

 private:
  // The last token on the way to a place in a text, and where that token begins.
  struct Step {
    double score = -std::numeric_limits<double>::infinity();
    size_t from = 0;
    std::optional<int64_t> id;  // none for an unknown character
  };

  // The way to each place with the greatest sum of scores (Viterbi).
  std::vector<Step> best_steps(std::string_view piece) const {
    std::vector<Step> best(piece.size() + 1);
    best[0].score = 0.0;
    size_t at = 0;
    for (const std::string_view character : utf8::characters(piece)) {
      const size_t one = character.size();
      bool has_one = false;
      for (size_t length = 1; length <= std::min(longest_, piece.size() - at); ++length) {
        const auto id = ids_.of(std::string(piece.substr(at, length)));
        if (!id || *id == unknown_) {
          continue;
        }
        has_one = has_one || length == one;
        const double score = best[at].score + scores_[static_cast<size_t>(*id)];
        if (score > best[at + length].score) {
          best[at + length] = {score, at, id};
        }
      }
      if (!has_one && best[at].score + unknown_score_ > best[at + one].score) {
        best[at + one] = {best[at].score + unknown_score_, at, std::nullopt};
      }
      at += one;
    }
    return best;
  }

  Ids ids_;
  std::vector<double> scores_;
  std::optional<int64_t> unknown_;
  double unknown_score_;
  size_t longest_ = 1;
  bool byte_fallback_;
};

}  // namespace

// Ids are places in a list; a damaged file must not ask for one that fills the memory.
void check_id(int64_t id) {
  constexpr int64_t kMost = int64_t{1} << 24;
  require(id >= 0 && id < kMost, "a token with id ", id, ",");
}

std::unique_ptr<Vocabulary> read_vocabulary(const Json& model) {
  // Files of early versions of tokenizers name no type.
  const std::string type = model.value("type", model.contains("merges") ? "BPE" : "");
  if (type == "BPE") {
    return std::make_unique<BytePairs>(model);
  }
  if (type == "Unigram") {
    return std::make_unique<Unigrams>(model);
  }
  throw Error("model '" + type + "'");
}

}  // namespace doubleweave::tokenizer

#include "added_tokens.h"

#include "regex.h"

namespace doubleweave::tokenizer {

void AddedTokens::add(const std::string& text, const AddedToken& token) {
  if (!text.empty()) {
    tokens_.emplace(text, token);
    first_bytes_.insert(text[0]);
  }
}

const std::pair<const std::string, AddedToken>* AddedTokens::at_beginning(
    std::string_view text) const {
  if (first_bytes_.contains(text[0])) {
    for (const auto& row : tokens_) {
      if (text.starts_with(row.first)) {
        return &row;
      }
    }
  }
  return nullptr;
}

std::vector<Part> AddedTokens::cut(std::string_view text) const {
  static const Regex kSpacesAtEnd(R"(\s+\z)");
  static const Regex kSpacesAtBeginning(R"(\A\s+)");
  std::vector<Part> parts;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const auto* found = at_beginning(text.substr(at));
    if (found == nullptr) {
      ++at;
      continue;
    }
    const auto& [content, token] = *found;
    std::string_view between = text.substr(begin, at - begin);
    if (token.strips_left) {
      if (const auto spaces = kSpacesAtEnd.find(between); !spaces.empty()) {
        between = between.substr(0, spaces.front().first);
      }
    }
    if (!between.empty()) {
      parts.push_back({between, std::nullopt});
    }
    parts.push_back({text.substr(at, content.size()), token.id});
    at += content.size();
    if (token.strips_right) {
      if (const auto spaces = kSpacesAtBeginning.find(text.substr(at)); !spaces.empty()) {
        at += spaces.front().second;
      }
    }
    begin = at;
  }
  if (begin < text.size()) {
    parts.push_back({text.substr(begin), std::nullopt});
  }
  return parts;
}

}  // namespace doubleweave::tokenizer

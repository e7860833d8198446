// Added tokens, such as <|im_start|>: a text is cut at them before the model sees it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace doubleweave::tokenizer {

struct AddedToken {
  int64_t id;
  bool strips_left;  // the white space before it belongs to it; strips_right: the one behind it
  bool strips_right;
};

/// A part of a text: an added token, or the text between two.
struct Part {
  std::string_view text;
  std::optional<int64_t> id;
};

class AddedTokens {
 public:
  /// The first token of a text stays; an empty text is never found.
  void add(const std::string& text, const AddedToken& token);

  /// The parts of a text, from left to right, without empty ones; where several tokens begin, the
  /// longest is found.
  std::vector<Part> cut(std::string_view text) const;

 private:
  const std::pair<const std::string, AddedToken>* at_beginning(std::string_view text) const;

  // A longer text comes before those that it begins with.
  std::map<std::string, AddedToken, std::greater<>> tokens_;
  std::set<char> first_bytes_;
};

}  // namespace doubleweave::tokenizer

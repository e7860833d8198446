// Regular expressions as tokenizers use them (Unicode properties, looking ahead), by PCRE2.
//
// The patterns of a tokenizer.json are Oniguruma's. PCRE2 has the same Unicode classes and
// lookaheads, which std::regex and RE2 lack; a pattern that the two read differently is refused.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace doubleweave::tokenizer {

class Regex {
 public:
  /// Throws Error for a pattern that PCRE2 does not take, or reads otherwise than Oniguruma.
  explicit Regex(const std::string& pattern);

  /// A pattern that matches this text alone.
  static std::string literal(std::string_view text);

  /// Where it matches, from left to right: begin and end of each.
  std::vector<std::pair<size_t, size_t>> find(std::string_view text) const;

  /// The text with `with` in the place of each match.
  std::string replace(std::string_view text, std::string_view with) const;

 private:
  std::shared_ptr<void> code_;
};

}  // namespace doubleweave::tokenizer

// Regular expressions as tokenizers use them (Unicode properties, looking ahead), by PCRE2.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace doubleweave::runner {

class Regex {
 public:
  /// Throws Error for a pattern that PCRE2 does not take.
  explicit Regex(const std::string& pattern);

  /// A pattern that matches this text alone.
  static std::string literal(std::string_view text);

  /// Where it matches, from left to right: begin and end of each.
  std::vector<std::pair<size_t, size_t>> find(std::string_view text) const;

 private:
  std::shared_ptr<void> code_;
};

}  // namespace doubleweave::runner

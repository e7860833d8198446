#include "regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <string_view>

#include "doubleweave/error.h"
#include "doubleweave/utf8.h"

namespace doubleweave::tokenizer {

namespace {

// In Oniguruma's Ruby syntax {1,3}+ repeats {1,3}; in PCRE2 it is possessive. After ?, * and + a
// second + is possessive in both.
bool has_counted_plus(const std::string& pattern) {
  for (size_t at = pattern.find("}+"); at != std::string::npos; at = pattern.find("}+", at + 1)) {
    if (at > 0 && (pattern[at - 1] == ',' || (pattern[at - 1] >= '0' && pattern[at - 1] <= '9'))) {
      return true;
    }
  }
  return false;
}

// "^" and "$" hold at every line in Oniguruma and at the ends of the text in PCRE2. They are no
// anchors after a backslash, and "^" is none at the beginning of a class.
bool is_no_anchor(const std::string& pattern, std::string_view other) {
  if (other != "^" && other != "$") {
    return false;
  }
  for (size_t at = pattern.find(other); at != std::string::npos; at = pattern.find(other, at + 1)) {
    if (at == 0 || (pattern[at - 1] != '\\' && (other == "$" || pattern[at - 1] != '['))) {
      return false;
    }
  }
  return true;
}

}  // namespace

Regex::Regex(const std::string& pattern) {
  // "&&" intersects classes in Oniguruma, and \h is a hexadecimal digit there.
  for (const char* other : {"&&", "\\h", "^", "$"}) {
    require(pattern.find(other) == std::string::npos || is_no_anchor(pattern, other), "pattern ",
            pattern, " (", other, " means another thing in PCRE2),");
  }
  require(!has_counted_plus(pattern), "pattern ", pattern,
          " (a counted + means another thing in PCRE2),");
  int number = 0;
  PCRE2_SIZE offset = 0;
  // UCP: \s, \d and \w are Unicode's, as in Oniguruma. \C could cut a character in two.
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &number, &offset, nullptr);
  if (code == nullptr) {
    std::array<PCRE2_UCHAR, 128> reason{};
    pcre2_get_error_message(number, reason.data(), reason.size());
    throw Error("pattern " + pattern + ": " + reinterpret_cast<const char*>(reason.data()));
  }
  code_ = std::shared_ptr<void>(
      code, [](void* pointer) { pcre2_code_free(static_cast<pcre2_code*>(pointer)); });
}

std::string Regex::literal(std::string_view text) {
  std::string pattern;
  for (const char c : text) {
    const bool is_plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                          (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80;
    pattern += is_plain ? std::string(1, c) : std::string("\\") + c;
  }
  return pattern;
}

std::vector<std::pair<size_t, size_t>> Regex::find(std::string_view text) const {
  auto* code = static_cast<pcre2_code*>(code_.get());
  require(utf8::is_valid(text), "prompt: is not valid Unicode; give it as UTF-8");
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code, nullptr), &pcre2_match_data_free);
  std::vector<std::pair<size_t, size_t>> found;
  size_t at = 0;
  while (at <= text.size()) {
    const int count = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                  PCRE2_NO_UTF_CHECK, match.get(), nullptr);
    if (count == PCRE2_ERROR_NOMATCH) {
      break;
    }
    require(count >= 0, "a tokenizer's pattern takes too long on this text; give it as token ids");
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(match.get());
    const bool is_empty = ends[1] == ends[0];
    // An empty match right behind the last one does not count, as with tokenizers' iterator.
    if (!is_empty || found.empty() || found.back().second != ends[0]) {
      found.emplace_back(ends[0], ends[1]);
    }
    if (!is_empty) {
      at = ends[1];
      continue;
    }
    do {  // behind an empty match, go on after the next character
      ++at;
    } while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  }
  return found;
}

std::string Regex::replace(std::string_view text, std::string_view with) const {
  std::string result;
  size_t at = 0;
  for (const auto& [begin, end] : find(text)) {
    result.append(text.substr(at, begin - at)).append(with);
    at = end;
  }
  return result.append(text.substr(at));
}

}  // namespace doubleweave::tokenizer

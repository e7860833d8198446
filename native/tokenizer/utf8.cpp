#include "doubleweave/utf8.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace doubleweave::utf8 {

namespace {

unsigned char byte_at(std::string_view text, size_t at) {
  return static_cast<unsigned char>(text[at]);
}

// How many bytes at `at` are a character, and whether they are a whole one; at least one byte. The
// ranges are those of Unicode's table of well-formed byte sequences (chapter 3, table 3-7).
std::pair<size_t, bool> measure(std::string_view text, size_t at) {
  const unsigned char first = byte_at(text, at);
  if (first < 0x80) {
    return {1, true};
  }
  const size_t length = first >= 0xF0 && first <= 0xF4   ? 4
                        : first >= 0xE0 && first <= 0xEF ? 3
                        : first >= 0xC2 && first <= 0xDF ? 2
                                                         : 0;
  size_t found = 1;
  while (found < length && at + found < text.size()) {
    const unsigned char next = byte_at(text, at + found);
    unsigned char low = 0x80;
    unsigned char high = 0xBF;
    if (found == 1) {  // no overlong forms, surrogates, or numbers past U+10FFFF
      low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : low;
      high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : high;
    }
    if (next < low || next > high) {
      break;
    }
    ++found;
  }
  return {found, length != 0 && found == length};
}

// As Python's str.isspace: U+001C to U+001F are space there, and are not in Unicode's White_Space.
bool is_space(std::string_view character) {
  const uint32_t c = code_point(character);
  if (character.size() == 1) {  // a byte past ASCII is no character by itself
    return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20);
  }
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

}  // namespace

std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> found;
  for (size_t at = 0; at < text.size();) {
    const auto [bytes, is_whole] = measure(text, at);
    const size_t step = is_whole ? bytes : 1;
    found.push_back(text.substr(at, step));
    at += step;
  }
  return found;
}

uint32_t code_point(std::string_view character) {
  const unsigned char first = byte_at(character, 0);
  if (character.size() == 1) {
    return first;
  }
  uint32_t number = first & (0x7Fu >> character.size());
  for (size_t i = 1; i < character.size(); ++i) {
    number = number << 6 | (byte_at(character, i) & 0x3Fu);
  }
  return number;
}

std::string encode(uint32_t number) {
  if (number < 0x80) {
    return {static_cast<char>(number)};
  }
  const int more = number < 0x800 ? 1 : number < 0x10000 ? 2 : 3;
  std::string text(1, static_cast<char>((0xFF00u >> (more + 1) & 0xFFu) | number >> 6 * more));
  for (int i = more - 1; i >= 0; --i) {
    text += static_cast<char>(0x80 | (number >> 6 * i & 0x3F));
  }
  return text;
}

bool is_valid(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const auto [bytes, is_whole] = measure(text, at);
    if (!is_whole) {
      return false;
    }
    at += bytes;
  }
  return true;
}

std::string lossy(std::string_view bytes) {
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    const auto [found, is_whole] = measure(bytes, at);
    text += is_whole ? std::string(bytes.substr(at, found)) : "\xEF\xBF\xBD";
    at += found;
  }
  return text;
}

size_t begun(std::string_view bytes) {
  for (size_t held = std::min<size_t>(3, bytes.size()); held > 0; --held) {
    const std::string_view end = bytes.substr(bytes.size() - held);
    // The character that another byte would make whole, or bring nearer.
    const auto [found, is_whole] = measure(end, 0);
    if (found == held && !is_whole && byte_at(end, 0) >= 0xC2 && byte_at(end, 0) <= 0xF4) {
      return held;
    }
  }
  return 0;
}

std::string_view stripped(std::string_view text) {
  const std::vector<std::string_view> found = characters(text);
  const auto begin = std::ranges::find_if_not(found, is_space);
  const auto end = std::find_if_not(found.rbegin(), std::make_reverse_iterator(begin), is_space);
  if (begin == found.end()) {
    return {};
  }
  const size_t first = static_cast<size_t>(begin->data() - text.data());
  return text.substr(first, static_cast<size_t>(end->data() - text.data()) + end->size() - first);
}

}  // namespace doubleweave::utf8

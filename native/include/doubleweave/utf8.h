// UTF-8, one character at a time. Part of the tokenizer's library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace doubleweave::utf8 {

/// The characters of a text, as views of their bytes; a byte that begins none is one by itself.
std::vector<std::string_view> characters(std::string_view text);

/// The number of a character that characters() gave.
uint32_t code_point(std::string_view character);

/// The bytes of the character with this number.
std::string encode(uint32_t code_point);

/// Whether a text is UTF-8 throughout.
bool is_valid(std::string_view text);

/// Bytes as a text: what is no UTF-8 becomes U+FFFD, one for each longest piece that could have
/// begun a character (as Rust's from_utf8_lossy does).
std::string lossy(std::string_view bytes);

/// How many bytes at the end of `bytes` are the beginning of a character that is not whole yet.
size_t begun(std::string_view bytes);

/// A text without the white space at its two ends: the characters that Python's str.strip takes
/// away, and so the trim of a chat template.
std::string_view stripped(std::string_view text);

}  // namespace doubleweave::utf8

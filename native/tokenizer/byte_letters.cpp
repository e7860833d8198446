#include "byte_letters.h"

#include <cstdint>

#include "doubleweave/utf8.h"

namespace doubleweave::tokenizer {

// bytes_to_unicode of GPT-2's encoder.py: bytes that Latin-1 prints stay, and the others get the
// letters from U+0100 on, in order. A vocabulary then has neither spaces nor control characters.
const std::array<std::string, 256>& byte_letters() {
  static const auto kLetters = [] {
    std::array<std::string, 256> letters;
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool is_printed = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
      letters[byte] = utf8::encode(is_printed ? byte : next++);
    }
    return letters;
  }();
  return kLetters;
}

}  // namespace doubleweave::tokenizer

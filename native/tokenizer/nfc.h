// Unicode's normalization form C.
#pragma once

#include <string_view>

namespace doubleweave::tokenizer {

/// Whether a text is in NFC, by Unicode's quick check: true is certain, false may be wrong.
bool is_surely_nfc(std::string_view text);

}  // namespace doubleweave::tokenizer

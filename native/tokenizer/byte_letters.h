// Bytes as letters that can be seen: the alphabet of byte-level tokenizers, from GPT-2.
#pragma once

#include <array>
#include <string>

namespace doubleweave::tokenizer {

/// A letter for each byte, in UTF-8.
const std::array<std::string, 256>& byte_letters();

}  // namespace doubleweave::tokenizer

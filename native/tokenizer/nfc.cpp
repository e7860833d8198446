#include "nfc.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "doubleweave/utf8.h"

namespace doubleweave::tokenizer {

namespace {

// A range of characters, as nfc_table.py writes them; characters in none have class 0 and pass.
struct Composing {
  uint32_t first;
  uint32_t last;
  int combining_class;
  bool passes;
};

constexpr Composing kTable[] = {
#include "nfc_table.inc"
};

}  // namespace

// Unicode Standard Annex #15, section 9: a text is in NFC when each of its characters may occur in
// NFC and marks that combine stand in the order of their classes. Composing for real would need the
// tables of all decompositions; nearly all texts pass.
bool is_surely_nfc(std::string_view text) {
  int before = 0;
  for (const std::string_view character : utf8::characters(text)) {
    const uint32_t c = utf8::code_point(character);
    const auto* found =
        std::upper_bound(std::begin(kTable), std::end(kTable), c,
                         [](uint32_t number, const Composing& row) { return number < row.first; });
    const bool is_listed = found != std::begin(kTable) && c <= found[-1].last;
    const int combining_class = is_listed ? found[-1].combining_class : 0;
    if ((is_listed && !found[-1].passes) || (combining_class != 0 && combining_class < before)) {
      return false;
    }
    before = combining_class;
  }
  return true;
}

}  // namespace doubleweave::tokenizer

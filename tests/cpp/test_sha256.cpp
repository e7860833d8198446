// Checks SHA-256 against the examples of FIPS 180-4, with the processor's instructions and without.
#include <algorithm>
#include <string>
#include <utility>

#include "check.h"
#include "doubleweave/sha256.h"

namespace {

std::string hash(const std::string& text, size_t step, bool allowed) {
  doubleweave::Sha256 hash(allowed);
  for (size_t at = 0; at < text.size(); at += step) {
    hash.add(text.data() + at, std::min(step, text.size() - at));
  }
  return hash.finish();
}

void test_the_examples() {
  const std::string two_blocks = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
  const std::pair<std::string, const char*> examples[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {two_blocks, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {std::string(1000000, 'a'),
       "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
  for (const auto& [text, wanted] : examples) {
    for (const bool allowed : {true, false}) {
      for (const size_t step : {size_t{1}, size_t{63}, size_t{64}, size_t{100}, size_t{1000000}}) {
        const std::string found = hash(text, step, allowed);
        CHECK(found == wanted, "%zu bytes by %zu: found %s", text.size(), step, found.c_str());
      }
    }
  }
}

void test_every_length_of_the_last_block() {
  std::string text;
  for (int length = 0; length < 200; ++length) {
    const std::string plain = hash(text, 200, false);
    CHECK(hash(text, 7, true) == plain, "%d bytes", length);
    text += static_cast<char>(length);
  }
}

}  // namespace

int main() {
  test_the_examples();
  test_every_length_of_the_last_block();
  return check::finish();
}

// Checks the tokenizer's library: UTF-8, patterns, NFC, and small files of each family. The ids and
// texts expected are those that Hugging Face's tokenizers 0.23 gives for the same file.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.h"
#include "doubleweave/tokenizer.h"
#include "doubleweave/utf8.h"
#include "tokenizer/byte_letters.h"
#include "tokenizer/nfc.h"
#include "tokenizer/regex.h"

namespace dw = doubleweave;
using dw::tokenizer::Regex;
using Ids = std::vector<int64_t>;

namespace {

// As SmolLM2's: digits by themselves, then GPT-2's bytes.
constexpr const char* kByteLevel = R"json({
  "added_tokens": [
    {"id": 16, "content": "<|end|>", "single_word": false, "lstrip": true, "rstrip": false,
      "normalized": false, "special": true},
    {"id": 17, "content": "<mask>", "single_word": false, "lstrip": false, "rstrip": true,
      "normalized": false, "special": false},
    {"id": 18, "content": "<m", "single_word": false, "lstrip": false, "rstrip": false,
      "normalized": false, "special": false}],
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": true},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
  "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
  "model": {"type": "BPE",
    "vocab": {"h": 0, "e": 1, "l": 2, "o": 3, "Ġ": 4, "Ã": 5, "©": 6, "1": 7, "2": 8, "a": 9,
      "he": 10, "ll": 11, "hell": 12, "hello": 13, "Ġhello": 14, "lo": 15},
    "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["Ġ", "hello"], ["l", "o"]]}
})json";

// As Llama 2's converted SentencePiece model, whose merges older files join with a space.
constexpr const char* kByteFallback = R"json({
  "added_tokens": [
    {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false,
      "normalized": false, "special": true},
    {"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
      "normalized": false, "special": true},
    {"id": 10, "content": "bb", "single_word": false, "lstrip": false, "rstrip": false,
      "normalized": true, "special": false}],
  "normalizer": {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
  "post_processor": {"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
  "decoder": {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
  "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
    "vocab": {"<unk>": 0, "<s>": 1, "<0xC3>": 2, "<0xA9>": 3, "<0x21>": 4, "▁": 5, "a": 6, "b": 7,
      "ab": 8, "▁ab": 9},
    "merges": ["a b", "▁ ab"]}
})json";

constexpr const char* kUnigram = R"json({
  "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
  "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
  "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
    "vocab": [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["b", -3.5], ["▁a", -4.5], ["ab", -5.0],
      ["bb", -8.0]]}
})json";

// As Llama 3's, cut by a pattern with a lookahead.
constexpr const char* kSplit = R"json({
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|\\s"}, "behavior": "Isolated",
      "invert": false},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
  "model": {"type": "BPE", "ignore_merges": true,
    "vocab": {"a": 0, "b": 1, "1": 2, "2": 3, "Ġ": 4, "22": 5, "ĠĠ": 6, "ba": 7, "bab": 8},
    "merges": [["2", "2"], ["Ġ", "Ġ"], ["b", "a"]]}
})json";

// A tokenizer of a file with this text.
dw::Tokenizer made(const std::string& text) {
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() /
      ("doubleweave_test_tokenizer_" + std::to_string(std::random_device()()) + ".json");
  std::ofstream(path, std::ios::binary) << text;
  const struct Remover {
    const std::filesystem::path& path;
    ~Remover() { std::filesystem::remove(path); }
  } remover{path};
  return dw::Tokenizer(path);
}

std::string shown(const Ids& ids) {
  std::string text;
  for (const int64_t id : ids) {
    text += std::to_string(id) + " ";
  }
  return text;
}

void check_encode(const dw::Tokenizer& tokenizer, std::string_view text, const Ids& expected,
                  bool with_special = true) {
  const Ids found = tokenizer.encode(text, with_special);
  CHECK(found == expected, "'%s': found %s, expected %s", std::string(text).c_str(),
        shown(found).c_str(), shown(expected).c_str());
}

void check_decode(const dw::Tokenizer& tokenizer, const Ids& ids, std::string_view expected) {
  const std::string found = tokenizer.decode(ids);
  CHECK(found == expected, "%s: found '%s', expected '%s'", shown(ids).c_str(), found.c_str(),
        std::string(expected).c_str());
}

void check_stream(const dw::Tokenizer& tokenizer, const Ids& ids,
                  const std::vector<std::string>& expected) {
  dw::Tokenizer::Stream stream(tokenizer);
  std::vector<std::string> found;
  for (const int64_t id : ids) {
    found.push_back(stream.push(id));
  }
  found.push_back(stream.finish());
  CHECK(found == expected, "%s comes in other pieces", shown(ids).c_str());
}

void test_utf8() {
  namespace utf8 = dw::utf8;
  using Views = std::vector<std::string_view>;
  CHECK(utf8::characters("aé日😀") == (Views{"a", "é", "日", "😀"}), "one to four bytes");
  CHECK(utf8::characters("\xE6\x97z\xFF") == (Views{"\xE6", "\x97", "z", "\xFF"}), "broken bytes");
  for (const uint32_t number : {0x0u, 0x7Fu, 0x80u, 0x7FFu, 0x800u, 0xFFFFu, 0x10000u, 0x10FFFFu}) {
    const std::string text = utf8::encode(number);
    CHECK(utf8::is_valid(text) && utf8::code_point(text) == number, "U+%04X", number);
  }
  CHECK(utf8::encode(0x1F600) == "😀", "four bytes");
  for (const char* wrong :
       {"\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\x80", "a\xC3"}) {
    CHECK(!utf8::is_valid(wrong), "overlong, surrogate, past the last, or not whole");
  }
  CHECK(utf8::lossy("\xE6\x97z\xFF\xFF") == "\uFFFDz\uFFFD\uFFFD",
        "one for a piece of a character");
  for (const auto& [bytes, held] :
       std::vector<std::pair<std::string, size_t>>{{"", 0},
                                                   {"a", 0},
                                                   {"\xE6", 1},
                                                   {"a\xE6\x97", 2},
                                                   {"\xF0\x9F\x98", 3},
                                                   {"日", 0},
                                                   {"\xF0\x9F\x98\x80", 0},
                                                   {"\xE6\x97\xE6", 1},
                                                   {"\x97", 0},
                                                   {"\xFF", 0},
                                                   {"\xED\xA0", 0}}) {
    CHECK(utf8::begun(bytes) == held, "'%s' has begun a character", bytes.c_str());
  }
  CHECK(utf8::stripped("\x1F \u00A0\u3000a b\u2028\n") == "a b", "as Python's str.strip");
  CHECK(utf8::stripped(" \t").empty() && utf8::stripped("").empty(), "nothing is left");
  CHECK(utf8::stripped("\x85 a\xA0") == "\x85 a\xA0", "lone bytes are no spaces");
}

void test_patterns() {
  using Spans = std::vector<std::pair<size_t, size_t>>;
  CHECK(Regex(R"(\p{L}+|\s+(?!\S)|\s)").find("é  b") == (Spans{{0, 2}, {2, 3}, {3, 4}, {4, 5}}),
        "letters, and spaces up to the last");
  CHECK(Regex(R"((?=\d))").find("a12") == (Spans{{1, 1}, {2, 2}}), "empty matches");
  CHECK(Regex("b*").find("abb") == (Spans{{0, 0}, {1, 3}}), "none right behind the last match");
  CHECK(Regex(Regex::literal("a.b")).find("a.b axb") == (Spans{{0, 3}}), "a literal text");
  CHECK(Regex("[^a]|\\$|\\^").find("ab") == (Spans{{1, 2}}), "no anchors");
  CHECK(Regex(" +").replace(" a  b", "▁") == "▁a▁b", "replaced");
  for (const char* other : {"[a-z&&[b]]", R"(\h)", "^a", "a$", "a{1,2}+"}) {
    CHECK_REFUSED(Regex{other}, "means another thing in PCRE2");
  }
  CHECK_REFUSED(Regex{"(a"}, "pattern (a: missing closing parenthesis");
  CHECK_REFUSED(Regex{"a"}.find("\xFF"), "is not valid Unicode");
}

void test_nfc() {
  using dw::tokenizer::is_surely_nfc;
  for (const char* text : {"", "ascii", "Größe", "Việt Nam", "한국어", "हिन्दी", "q\u0316\u033F"}) {
    CHECK(is_surely_nfc(text), "'%s' is composed", text);
  }
  for (const char* text : {"e\u0301", "\u1100\u1161", "q\u033F\u0316", "\u212B"}) {
    CHECK(!is_surely_nfc(text), "'%s' is not", text);
  }
  const char* file = R"json({"normalizer": {"type": "NFC"},
    "model": {"type": "BPE", "vocab": {"e": 0, "é": 1}, "merges": []}})json";
  check_encode(made(file), "eé", {0, 1});
  CHECK_REFUSED(made(file).encode("e\u0301", true), "puts texts into Unicode's NFC");
}

void test_byte_level() {
  const auto& letters = dw::tokenizer::byte_letters();
  CHECK(letters['a'] == "a" && letters[' '] == "Ġ" && letters[0] == "Ā" && letters[0xAD] == "Ń",
        "GPT-2's letters");
  const dw::Tokenizer tokenizer = made(kByteLevel);
  check_encode(tokenizer, "hello hello", {13, 14});
  check_encode(tokenizer, "hhello", {0, 13});
  check_encode(tokenizer, "llo é 12", {11, 3, 4, 5, 6, 4, 7, 8});
  check_encode(tokenizer, "", {});
  check_decode(tokenizer, {11, 3, 4, 5, 6, 4, 7, 8}, "llo é 12");
  check_decode(tokenizer, {6, 13}, "\uFFFDhello");
  check_decode(tokenizer, {5, 0}, "\uFFFDh");
  check_stream(tokenizer, {13, 5, 6, 5, 0, 5}, {"hello", "", "é", "", "\uFFFDh", "", "\uFFFD"});
  CHECK_REFUSED(tokenizer.encode("a\xFF", true), "prompt: is not valid Unicode");
}

void test_added_tokens() {
  const dw::Tokenizer tokenizer = made(kByteLevel);
  check_encode(tokenizer, "a<|end|>  hello", {9, 16, 4, 14});
  check_encode(tokenizer, "hello <|end|>", {13, 16});
  check_encode(tokenizer, "he<mask>llo", {10, 17, 11, 3});
  check_encode(tokenizer, "<mask>  llo<m", {17, 11, 3, 18});
  check_decode(tokenizer, {9, 16, 4, 14}, "a  hello");
  check_decode(tokenizer, {10, 17, 11, 3}, "he<mask>llo");
  check_decode(tokenizer, {13, 99, -1, 16, 14}, "hello hello");
}

void test_byte_fallback() {
  const dw::Tokenizer tokenizer = made(kByteFallback);
  check_encode(tokenizer, "ab ab", {1, 9, 9});
  check_encode(tokenizer, "ab ab", {9, 9}, false);
  check_encode(tokenizer, "", {1});
  check_encode(tokenizer, "é!", {1, 5, 2, 3, 4});
  check_encode(tokenizer, "日本b", {1, 5, 0, 7});
  check_encode(tokenizer, "ß", {1, 5, 0});  // only one of its two bytes is a token
  check_encode(tokenizer, "<s>ab", {1, 9}, false);
  check_encode(tokenizer, "ab  b", {1, 9, 5, 5, 7});
  check_encode(tokenizer, "bb ab", {1, 10, 9});  // found once it is normalized
  check_encode(tokenizer, "a bb", {1, 5, 6, 10});
  check_decode(tokenizer, {1, 9, 9}, "ab ab");
  check_decode(tokenizer, {1, 5, 2, 3, 4}, "é!");
  check_decode(tokenizer, {2, 6}, "\uFFFDa");
  check_decode(tokenizer, {9, 2, 2, 6}, "ab\uFFFD\uFFFDa");
  check_decode(tokenizer, {2, 3, 2}, "\uFFFD\uFFFD\uFFFD");
  check_decode(tokenizer, {10, 6}, "bba");
  check_decode(tokenizer, {6, 10}, "abb");
  check_stream(tokenizer, {1, 9, 9, 2, 3, 2, 5, 6},
               {"", "ab", " ab", "", "", "", "\uFFFD\uFFFD\uFFFD ", "a", ""});
}

void test_unigrams() {
  const dw::Tokenizer tokenizer = made(kUnigram);
  check_encode(tokenizer, "ab ab", {1, 5, 1, 5});
  check_encode(tokenizer, "abé b", {1, 5, 0, 1, 3});
  check_encode(tokenizer, "bba", {1, 3, 3, 2});
  check_encode(tokenizer, " a", {4});
  check_decode(tokenizer, {1, 5, 0, 1, 3}, "ab<unk> b");
  check_decode(tokenizer, {1, 2, 4}, "a a");
}

void test_pieces_that_are_whole_tokens() {
  const dw::Tokenizer tokenizer = made(kSplit);
  check_encode(tokenizer, "bab bba 222 ", {8, 4, 1, 7, 4, 5, 3, 4});
  check_encode(tokenizer, "a1b22", {0, 2, 1, 5});
  check_encode(tokenizer, "a  b ", {0, 4, 4, 1, 4});
  check_decode(tokenizer, {8, 6}, "bab  ");
}

void test_bad_files() {
  CHECK_REFUSED(dw::Tokenizer("/nowhere/tokenizer.json"), "/nowhere/tokenizer.json: missing");
  for (const char* text : {"", "{", "[]", "{}", R"({"model": {"type": "BPE"}})",
                           R"({"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}})"}) {
    CHECK_REFUSED(made(text), "is not a tokenizer (");
  }
  // Of two members with one name the later is read.
  const auto with = [](const std::string& members) {
    return R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, )" + members + "}";
  };
  const std::vector<std::pair<std::string, std::string>> cases{
      {R"("normalizer": {"type": "Lowercase"})", "needs normalizer 'Lowercase' which there is not"},
      {R"("pre_tokenizer": {"type": "Punctuation"})", "needs pre-tokenizer 'Punctuation'"},
      {R"("pre_tokenizer": {"type": "Metaspace", "replacement": "__"})", "with replacement '__'"},
      {R"("pre_tokenizer": {"type": "Split", "behavior": "Odd"})", "Split with behavior 'Odd'"},
      {R"("decoder": {"type": "CTC"})", "needs decoder 'CTC'"},
      {R"("post_processor": {"type": "BertProcessing"})", "needs post-processor 'BertProcessing'"},
      {R"("truncation": {})", "needs truncation,"},
      {R"("padding": {})", "needs padding,"},
      {R"("added_tokens": [{"id": 1, "content": "b", "special": true, "single_word": true}])",
       "needs added tokens that are single words"},
      {R"("added_tokens": [{"id": -1, "content": "b", "special": true}])", "a token with id -1"},
      {R"("model": {"type": "WordPiece"})", "needs model 'WordPiece'"},
      {R"("model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": []})", "id 99999999"},
      {R"("model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]})",
       "tokens that do not exist"},
      {R"("model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["aa"]})", "a merge of one token"},
      {R"("model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"})",
       "model BPE with end_of_word_suffix"}};
  for (const auto& [members, message] : cases) {
    CHECK_REFUSED(made(with(members)), message);
  }
}

}  // namespace

int main() {
  test_utf8();
  test_patterns();
  test_nfc();
  test_byte_level();
  test_added_tokens();
  test_byte_fallback();
  test_unigrams();
  test_pieces_that_are_whole_tokens();
  test_bad_files();
  return check::finish();
}

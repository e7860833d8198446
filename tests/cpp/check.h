// What the C++ tests check with: a condition, and a printf for where it fails. Each is its own
// main.
#pragma once

#include <atomic>
#include <cstdio>
#include <exception>
#include <string>

namespace check {

inline std::atomic<int> num_passed{0};
inline std::atomic<int> num_failed{0};

/// The exit code of a test: 0 when everything passed.
inline int finish() {
  std::printf("%d passed, %d failed\n", num_passed.load(), num_failed.load());
  return num_failed == 0 ? 0 : 1;
}

/// The sentence that `act` throws, or a note that it throws none.
template <typename Act>
std::string refusal(const Act& act) {
  try {
    act();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "(nothing was refused)";
}

}  // namespace check

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (condition) {                                              \
      ++check::num_passed;                                        \
    } else {                                                      \
      ++check::num_failed;                                        \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

/// Whether the sentence that `act` throws has `part` in it.
#define CHECK_REFUSED(act, part)                                                    \
  do {                                                                              \
    const std::string sentence = check::refusal([&] { act; });                      \
    CHECK(sentence.find(part) != std::string::npos, "found: %s", sentence.c_str()); \
  } while (false)

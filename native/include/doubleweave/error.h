// The exceptions that the run time throws, and how their messages are put together. Knows nothing
// of ExecuTorch or Python.
#pragma once

#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

namespace doubleweave {

/// A wrong argument, a damaged program or a method that failed. what() is one sentence that says
/// what was found, what was expected and what to do.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}
};

/// A run was stopped because its `interrupted` callback said so.
class Interrupted : public Error {
 public:
  Interrupted() : Error("the run was interrupted") {}
};

/// Joins the arguments as a stream would print them.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// Throws Error with the text of `parts` unless `holds`; they are put together only then.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    throw Error(text(parts...));
  }
}

/// Prints sizes as "[1, 128, 576]".
struct SizesText {
  std::span<const int32_t> sizes;

  friend std::ostream& operator<<(std::ostream& stream, const SizesText& text) {
    stream << '[';
    for (size_t i = 0; i < text.sizes.size(); ++i) {
      stream << (i == 0 ? "" : ", ") << text.sizes[i];
    }
    return stream << ']';
  }
};

}  // namespace doubleweave

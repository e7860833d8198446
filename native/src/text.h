// Small helpers that put error messages together.
#pragma once

#include <span>
#include <sstream>
#include <string>

namespace doubleweave {

/// Joins the arguments as a stream would print them.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// Sizes as "[1, 128, 576]".
template <typename Integer>
std::string sizes_text(std::span<Integer> sizes) {
  std::string result = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    result += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return result + "]";
}

}  // namespace doubleweave

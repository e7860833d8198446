// The exceptions that the run time throws. Knows nothing of ExecuTorch or Python.
#pragma once

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

}  // namespace doubleweave

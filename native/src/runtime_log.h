// ExecuTorch's log and its fatal checks, turned into text for our exceptions.
#pragma once

#include <executorch/runtime/core/error.h>

#include <string>

#include "doubleweave/error.h"

namespace doubleweave {

/// A check inside ExecuTorch failed that would have ended the process. The objects involved are in
/// an unknown state: never run or free them.
class FatalCheck : public Error {
 public:
  using Error::Error;
};

/// Takes over ExecuTorch's log, once per process: errors are kept for failure_text(), and
/// everything goes to stderr only if the environment variable DOUBLEWEAVE_LOG is set. Initialises
/// the runtime.
void init_runtime();

/// While it lives, ExecuTorch's errors on this thread are collected, and its fatal checks throw
/// FatalCheck instead of ending the process.
class LogScope {
 public:
  LogScope();
  ~LogScope();
  LogScope(const LogScope&) = delete;
  LogScope& operator=(const LogScope&) = delete;
};

/// "Error::InvalidArgument: <the last errors that ExecuTorch logged on this thread>".
std::string failure_text(executorch::runtime::Error error);

}  // namespace doubleweave

// Which method runs in this thread, for doubleweave/crash.h.
#pragma once

namespace doubleweave {

/// Names the method that this thread runs while it lives; `method` must outlive it.
class CrashScope {
 public:
  explicit CrashScope(const char* method);
  ~CrashScope();
  CrashScope(const CrashScope&) = delete;
  CrashScope& operator=(const CrashScope&) = delete;

 private:
  const char* outer_;
};

}  // namespace doubleweave

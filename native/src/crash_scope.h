// Which method runs in this thread, for doubleweave/crash.h.
#pragma once

namespace doubleweave {

/// While one is alive a crash of this thread is said to be of `method`, which must outlive it.
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

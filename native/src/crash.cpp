#include "doubleweave/crash.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstring>
#include <utility>

#include "crash_scope.h"

namespace doubleweave {

namespace {

constexpr std::array<std::pair<int, const char*>, 5> kSignals{{
    {SIGSEGV, "segmentation fault"},
    {SIGBUS, "bus error"},
    {SIGILL, "illegal instruction"},
    {SIGFPE, "arithmetic error"},
    {SIGABRT, "abort"},
}};

// Read in a handler, where the first use of one of another model might allocate.
[[gnu::tls_model("initial-exec")]] thread_local const char* method_here = nullptr;
std::atomic<int> errors_to{-1};
std::atomic<int> exit_with{0};

// A sentence put together where nothing may be allocated.
class Sentence {
 public:
  void add(const char* part) {
    const size_t length = std::min(std::strlen(part), text_.size() - length_);
    std::memcpy(text_.data() + length_, part, length);
    length_ += length;
  }

  void write_to(int file) const {
    size_t done = 0;
    while (done < length_) {
      const ssize_t count = ::write(file, text_.data() + done, length_ - done);
      if (count <= 0) {
        return;
      }
      done += static_cast<size_t>(count);
    }
  }

 private:
  std::array<char, 512> text_{};
  size_t length_ = 0;
};

void on_crash(int signal) {
  Sentence sentence;
  sentence.add("doubleweave: ");
  if (method_here != nullptr) {
    sentence.add("method '");
    sentence.add(method_here);
    sentence.add("'");
  } else {
    sentence.add("the program, outside any method,");
  }
  sentence.add(" crashed (");
  for (const auto& [number, name] : kSignals) {
    if (number == signal) {
      sentence.add(name);
    }
  }
  sentence.add(method_here == nullptr
                   ? ")\n"
                   : "); compile the program again, or keep the method's segment on the CPU\n");
  sentence.write_to(errors_to);
  ::_exit(exit_with);
}

}  // namespace

CrashScope::CrashScope(const char* method) : outer_(std::exchange(method_here, method)) {}

CrashScope::~CrashScope() { method_here = outer_; }

void say_crashes(int exit_code) {
  exit_with = exit_code;
  if (errors_to < 0) {
    errors_to = ::dup(STDERR_FILENO);  // it may be redirected while a library loads
  }
  struct sigaction action = {};
  action.sa_handler = on_crash;
  for (const auto& [number, name] : kSignals) {
    ::sigaction(number, &action, nullptr);
  }
}

}  // namespace doubleweave

#include "runtime_log.h"

#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace doubleweave {
namespace {

// Long enough for an operator's error and the delegate's that follows from it.
constexpr size_t kMaxKept = 600;

bool print_log = false;
thread_local int scope_depth = 0;
thread_local std::string kept;

void emit(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line,
          const char* message, size_t) {
  if (print_log || (scope_depth == 0 && level == kFatal)) {
    std::fprintf(stderr, "%c executorch:%s:%zu] %s\n", static_cast<char>(level), file, line,
                 message);
  }
  if (scope_depth > 0 && (level == kError || level == kFatal) && kept.size() < kMaxKept) {
    kept += (kept.empty() ? "" : "; ");
    // Names out of a damaged file may hold any byte.
    for (const char* byte = message; *byte != '\0'; ++byte) {
      kept += *byte >= 0x20 && *byte < 0x7f ? *byte : '?';
    }
  }
}

void throw_or_abort() {
  if (scope_depth > 0) {
    throw FatalCheck(
        text("a check inside ExecuTorch failed: ", kept.empty() ? "no message" : kept, "."));
  }
  std::abort();
}

void register_ours() {
  auto pal = executorch::runtime::PalImpl::create(emit, __FILE__);
  pal.abort = throw_or_abort;
  executorch::runtime::register_pal(pal);
}

// ExecuTorch's own Python modules, imported after us, put theirs in our place; without ours a
// failed check inside a method would end the process.
void keep_registered() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (executorch::runtime::get_pal_impl()->emit_log_message != emit) {
    register_ours();
  }
}

}  // namespace

void init_runtime() {
  static std::once_flag once;
  std::call_once(once, [] {
    print_log = std::getenv("DOUBLEWEAVE_LOG") != nullptr;
    register_ours();
    executorch::runtime::runtime_init();
  });
}

LogScope::LogScope() {
  keep_registered();
  if (scope_depth++ == 0) {
    kept.clear();
  }
}

LogScope::~LogScope() { --scope_depth; }

std::string failure_text(executorch::runtime::Error error) {
  std::string result = executorch::runtime::to_string(error);
  return kept.empty() ? result : result + ": " + kept;
}

}  // namespace doubleweave

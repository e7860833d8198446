#include "doubleweave/threads.h"

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "doubleweave/error.h"
#include "runtime_log.h"

// libexecutorch_threadpool.so exports google/pthreadpool and ExecuTorch's owner of it, but its
// wheel ships no header for either.
struct pthreadpool;
extern "C" {
size_t pthreadpool_get_threads_count(pthreadpool* pool);
size_t pthreadpool_set_threads_count(pthreadpool* pool, size_t num_threads);
void pthreadpool_parallelize_1d(pthreadpool* pool, void (*function)(void*, size_t), void* context,
                                size_t range, uint32_t flags);
}
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
pthreadpool* get_pthreadpool();
}  // namespace executorch::extension::threadpool

namespace doubleweave {
namespace {

// The pool's state and who uses it. Leaked on purpose: threads may still run while the process
// exits.
struct State {
  State() {
    init_runtime();
    pool = executorch::extension::threadpool::get_pthreadpool();
    require(pool != nullptr,
            "ExecuTorch has no thread pool on this machine: its processor was not recognised.");
    max_threads = static_cast<int>(pthreadpool_get_threads_count(pool));
    pool_threads = num_threads = max_threads;
  }

  pthreadpool* pool = nullptr;
  int max_threads = 0;
  int pool_threads = 0;
  int num_uses = 0;
  std::mutex mutex;
  std::condition_variable idle;
  int num_threads = 0;
  int num_active = 0;
};

State& state() {
  static State* const instance = new State();
  return *instance;
}

// The state, held by this thread alone.
struct Locked {
  State* operator->() const { return &state(); }

  const std::lock_guard<std::mutex> lock{state().mutex};
};

void check_pool(const State& s, int num_threads) {
  require(num_threads >= 1 && num_threads <= s.max_threads,
          "the number of intra-operator threads must be between 1 and ", s.max_threads,
          " on this machine, but was ", num_threads, ".");
}

void check(const State& s, int num_threads) {
  check_pool(s, num_threads);
  require(num_threads == 1 || num_threads == s.pool_threads,
          "the number of intra-operator threads must be 1 or ", s.pool_threads,
          ", the size of the thread pool, but was ", num_threads,
          "; set the pool's size before any method is loaded.");
}

}  // namespace

int max_threads() { return state().max_threads; }

int pool_threads() { return Locked()->pool_threads; }

void set_pool_threads(int num_threads) {
  State& s = state();
  check_pool(s, num_threads);
  std::unique_lock lock(s.mutex);
  if (num_threads == 1 || num_threads == s.pool_threads) {
    return;
  }
  require(s.num_uses == 0, "methods are loaded with a pool of ", s.pool_threads,
          " threads, so that 1 or ", s.pool_threads, " can take part, but ", num_threads,
          " were asked for; ask before the first method is loaded.");
  s.idle.wait(lock, [&] { return s.num_active == 0; });
  // A new pool, not pthreadpool_set_threads_count: with a number between 1 and its size the
  // pthreadpool of ExecuTorch 1.5 loses tiles (two of four threads: 105 of 20,000 2-D loops).
  using namespace executorch::extension::threadpool;
  get_threadpool()->_unsafe_reset_threadpool(static_cast<uint32_t>(num_threads));
  s.pool = get_pthreadpool();
  s.pool_threads = s.num_threads = num_threads;
}

PoolUse::PoolUse() { ++Locked()->num_uses; }

PoolUse::~PoolUse() { --Locked()->num_uses; }

int intra_op_threads() { return Locked()->num_threads; }

void set_intra_op_threads(int num_threads) { const IntraOpScope scope(num_threads); }

IntraOpScope::IntraOpScope() { ++Locked()->num_active; }

IntraOpScope::IntraOpScope(int num_threads) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  check(s, num_threads);
  // The number is the pool's, not the caller's: changed during a run, an operator would start with
  // one number of threads and end with another.
  s.idle.wait(lock, [&] { return s.num_active == 0 || s.num_threads == num_threads; });
  if (s.num_threads != num_threads) {
    pthreadpool_set_threads_count(s.pool, static_cast<size_t>(num_threads));
    s.num_threads = num_threads;
  }
  ++s.num_active;
}

IntraOpScope::~IntraOpScope() {
  const Locked s;
  if (--s->num_active == 0) {
    s->idle.notify_all();
  }
}

void parallel_items(size_t num_items, void (*function)(void*, size_t), void* context) {
  // With one thread set this runs inline, without the pool's lock.
  pthreadpool_parallelize_1d(state().pool, function, context, num_items, /*flags=*/0);
}

}  // namespace doubleweave

// How many threads one operator may use (intra-operator threads), process wide.
//
// All of ExecuTorch's kernels and delegates share one thread pool. A method keeps the pool it was
// loaded with, and between runs either one of its threads takes part or all. With one, every
// operator runs inline on its caller, without the pool's lock, so several workers run different
// instances at the same time. With all, one instance at a time uses them. Weights are packed once,
// whatever the number.
//
// A number in between is not possible: the pthreadpool that comes with ExecuTorch 1.5 then loses
// some of an operator's work and does other parts twice. For fewer threads than the machine has
// the pool is made smaller, which takes that no method is loaded.
#pragma once

#include <cstddef>

namespace doubleweave {

/// The most threads that the pool can have: one for each processor that ExecuTorch counts as fast.
int max_threads();

/// The threads of the pool; max_threads() until set_pool_threads is called.
int pool_threads();

/// Gives the pool `num_threads` threads; one thread fits any pool and changes nothing. Waits until
/// nothing runs. Throws Error unless 1 <= num_threads <= max_threads(), and where methods are
/// loaded with a pool of another size.
void set_pool_threads(int num_threads);

/// The number of threads that operators use now: 1 or pool_threads().
int intra_op_threads();

/// Waits until nothing runs, then lets operators use `num_threads` threads. Never call it from
/// inside a run. Throws Error unless it is 1 or pool_threads().
void set_intra_op_threads(int num_threads);

/// Keeps the pool's size while it lives: a loaded method holds a pointer to the pool.
class PoolUse {
 public:
  PoolUse();
  ~PoolUse();
  PoolUse(const PoolUse&) = delete;
  PoolUse& operator=(const PoolUse&) = delete;
};

/// Keeps the number of intra-operator threads while it lives. Scopes of the same number overlap; a
/// scope of another number waits until they have ended.
class IntraOpScope {
 public:
  /// Keeps whatever number is set now.
  IntraOpScope();
  /// Sets the number, waiting for runs that use another one. Throws Error as set_intra_op_threads
  /// does.
  explicit IntraOpScope(int num_threads);
  ~IntraOpScope();
  IntraOpScope(const IntraOpScope&) = delete;
  IntraOpScope& operator=(const IntraOpScope&) = delete;
};

/// Runs function(context, item) for every item in [0, num_items) on the intra-operator threads and
/// returns when all are done. `function` must not throw.
void parallel_items(size_t num_items, void (*function)(void*, size_t), void* context);

/// The same for a callable `void(size_t item)`.
template <typename Function>
void parallel_items(size_t num_items, Function&& function) {
  auto* context = &function;
  parallel_items(
      num_items,
      [](void* pointer, size_t item) { (*static_cast<decltype(context)>(pointer))(item); },
      const_cast<void*>(static_cast<const void*>(context)));
}

}  // namespace doubleweave

// How many threads one operator may use (intra-operator threads), process wide.
//
// All of ExecuTorch's kernels and delegates share one thread pool. A method keeps the pool it was
// loaded with, but how many of the pool's threads take part can change between runs: with one,
// every operator runs inline on its caller, without the pool's lock, so several workers run
// different instances at the same time; with more, one instance at a time uses all of them. Weights
// are packed once either way.
#pragma once

#include <cstddef>
#include <utility>

namespace doubleweave {

/// The largest number of intra-operator threads: as many as ExecuTorch's pool has, one for each
/// processor that it counts as fast.
int max_threads();

/// The number of threads that operators use now.
int intra_op_threads();

/// Waits until nothing runs, then lets operators use `num_threads` threads. Never call it from
/// inside a run. Throws Error unless 1 <= num_threads <= max_threads().
void set_intra_op_threads(int num_threads);

/// While one is alive the number of intra-operator threads stays what it asked for. Scopes that
/// agree overlap; one that disagrees waits until the others have ended.
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

// Threads that wait for work and are used again by every run.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <vector>

namespace doubleweave {

class WorkerThread {
 public:
  WorkerThread();
  /// Runs `job` on this thread, once what it does now has ended. The job must not throw.
  void start(std::function<void()> job);

 private:
  [[noreturn]] void loop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::function<void()> job_;
};

/// Borrows threads from the process-wide pool while it lives; the pool makes more when it has too
/// few and never ends one. The jobs must have ended before it is destroyed.
class BorrowedWorkers {
 public:
  explicit BorrowedWorkers(size_t num_workers);
  ~BorrowedWorkers();
  BorrowedWorkers(const BorrowedWorkers&) = delete;
  BorrowedWorkers& operator=(const BorrowedWorkers&) = delete;

  WorkerThread& operator[](size_t index) { return *threads_[index]; }

 private:
  std::vector<WorkerThread*> threads_;
};

}  // namespace doubleweave

#include "worker_pool.h"

#include <pthread.h>

#include <thread>
#include <utility>

namespace doubleweave {
namespace {

// Leaked on purpose: idle threads hold on to it while the process exits.
struct Pool {
  std::mutex mutex;
  std::vector<WorkerThread*> idle;
};

Pool*& pool_pointer() {
  static Pool* pool = [] {
    // A forked child has none of the threads: it starts with an empty pool.
    pthread_atfork(nullptr, nullptr, [] { pool_pointer() = new Pool(); });
    return new Pool();
  }();
  return pool;
}

}  // namespace

WorkerThread::WorkerThread() {
  // Detached: nothing ends it, and the process exits while it waits for a job.
  std::thread([this] { loop(); }).detach();
}

void WorkerThread::start(std::function<void()> job) {
  const std::lock_guard lock(mutex_);
  job_ = std::move(job);
  wake_.notify_one();
}

void WorkerThread::loop() {
  for (;;) {
    std::function<void()> job;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return job_ != nullptr; });
      job = std::exchange(job_, nullptr);
    }
    job();
  }
}

BorrowedWorkers::BorrowedWorkers(size_t num_workers) {
  Pool& pool = *pool_pointer();
  const std::lock_guard lock(pool.mutex);
  // Decoding is a run a token, which starting a thread each time would delay: they are used again.
  while (threads_.size() < num_workers) {
    if (pool.idle.empty()) {
      threads_.push_back(new WorkerThread());
    } else {
      threads_.push_back(pool.idle.back());
      pool.idle.pop_back();
    }
  }
}

BorrowedWorkers::~BorrowedWorkers() {
  Pool& pool = *pool_pointer();
  const std::lock_guard lock(pool.mutex);
  pool.idle.insert(pool.idle.end(), threads_.begin(), threads_.end());
}

}  // namespace doubleweave

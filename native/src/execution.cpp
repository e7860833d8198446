#include "doubleweave/execution.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "doubleweave/error.h"
#include "doubleweave/threads.h"
#include "instance_impl.h"
#include "padded_copy.h"
#include "prepared_task.h"
#include "schedule_order.h"
#include "worker_pool.h"

namespace doubleweave {
namespace {

using Clock = std::chrono::steady_clock;

// Short enough that Ctrl-C seems to act at once, long enough that taking Python's lock costs
// little.
constexpr auto kInterruptPeriod = std::chrono::milliseconds(30);
// How long a worker looks for what it waits for before it sleeps. Waking it costs some 60
// microseconds, and the one that wakes it some 15, so it looks for longer than most tasks take.
constexpr auto kSpinTime = std::chrono::milliseconds(5);
// Looks between two looks at the clock.
constexpr int kSpinsPerClock = 64;

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The number of a worker's tasks that have finished, on a cache line of its own: others spin on it,
// and two counters in one line would slow down two workers that have nothing to do with each other.
struct alignas(64) Progress {
  std::atomic<int32_t> num_finished{0};
};

}  // namespace

struct Execution::Impl {
  std::vector<Instance*> instances;
  std::vector<Region> regions;
  std::vector<Task> tasks;
  std::vector<std::vector<int32_t>> workers;
  int threads_per_worker;
  ScheduleOrder order;
  std::vector<PreparedTask> prepared;
  BaseLimit limit;
  bool spins;

  std::atomic<bool> running{false};

  // The state of one run.
  int64_t base = 0;
  std::vector<std::byte*> starts;  // of the regions
  Clock::time_point start;
  Clock::time_point next_poll;
  const std::function<bool()>* interrupted = nullptr;
  std::vector<std::vector<Event>> events;
  bool record = false;
  std::unique_ptr<Progress[]> progress;
  std::atomic<bool> stop{false};
  std::atomic<int> num_sleeping{0};
  std::mutex mutex;
  std::condition_variable changed;
  int num_helpers = 0;
  std::exception_ptr first_error;

  // See Instance::Impl::make_room: a run cannot change its number of threads on the way.
  void make_room(const Task& task) const {
    if (task.instance < 0 || threads_per_worker == pool_threads()) {
      return;
    }
    std::vector<int32_t> sizes;
    for (const Binding& input : task.inputs) {
      sizes.insert(sizes.end(), input.sizes.begin(), input.sizes.end());
    }
    instances[task.instance]->impl_->make_room(std::move(sizes));
  }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex);
    if (first_error == nullptr) {
      first_error = std::move(error);
    }
    stop.store(true, std::memory_order_seq_cst);
    changed.notify_all();  // workers that sleep would otherwise wait for tasks that never end
  }

  // Asks whether to go on; worker 0 only.
  void poll() {
    if (!*interrupted || stop.load(std::memory_order_relaxed) || Clock::now() < next_poll) {
      return;
    }
    next_poll = Clock::now() + kInterruptPeriod;
    try {
      if ((*interrupted)()) {
        throw Interrupted();
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }

  // False if the run stops before what is waited for has happened.
  bool wait_for(const Wait& wait, bool is_caller) {
    const std::atomic<int32_t>& finished = progress[wait.worker].num_finished;
    const auto is_done = [&] {
      return finished.load(std::memory_order_seq_cst) >= wait.num_finished;
    };
    const auto is_stopped = [&] { return stop.load(std::memory_order_seq_cst); };
    if (spins) {
      const auto until = Clock::now() + kSpinTime;
      do {
        for (int spin = 0; spin < kSpinsPerClock; ++spin) {
          if (finished.load(std::memory_order_acquire) >= wait.num_finished) {
            return true;
          }
          pause_briefly();
        }
      } while (!stop.load(std::memory_order_relaxed) && Clock::now() < until);
    }
    while (!is_done() && !is_stopped()) {
      // Announced before it looks again, and `publish` looks at it behind its store; both are
      // sequentially consistent, so that one of the two sees the other and nobody sleeps on.
      num_sleeping.fetch_add(1, std::memory_order_seq_cst);
      {
        std::unique_lock lock(mutex);
        changed.wait_for(lock, kInterruptPeriod, [&] { return is_done() || is_stopped(); });
      }
      num_sleeping.fetch_sub(1, std::memory_order_seq_cst);
      if (is_caller) {
        poll();
      }
    }
    return is_done();
  }

  void publish(int32_t worker, int32_t num_finished) {
    progress[worker].num_finished.store(num_finished, std::memory_order_seq_cst);
    // Nearly always nobody sleeps: a hand-over is then one store, about a microsecond.
    if (num_sleeping.load(std::memory_order_seq_cst) > 0) {
      const std::lock_guard lock(mutex);
      changed.notify_all();
    }
  }

  void run_task(int32_t t) {
    if (tasks[t].copy.has_value()) {
      copy_blocks(*tasks[t].copy, starts);
      return;
    }
    try {
      Instance::Impl& instance = *instances[tasks[t].instance]->impl_;
      const InstanceUse use(instance);
      for (int32_t row = 0; row < tasks[t].num_rows; ++row) {
        prepared[t].bind(instance, base, row, starts);
        instance.execute(threads_per_worker == 1);
      }
    } catch (const Error& error) {
      throw Error(text(TaskText{tasks, instances, t}, ": ", error.what()));
    }
  }

  void run_worker(int32_t worker) {
    const std::vector<int32_t>& list = workers[worker];
    try {
      for (size_t place = 0; place < list.size(); ++place) {
        const int32_t t = list[place];
        for (const Wait& wait : order.waits[t]) {
          if (!wait_for(wait, worker == 0)) {
            return;
          }
        }
        if (worker == 0) {
          poll();
        }
        if (stop.load(std::memory_order_relaxed)) {
          return;
        }
        const auto begin = record ? Clock::now() : Clock::time_point();
        run_task(t);
        if (record) {
          events[worker].push_back(
              {t, worker, (begin - start).count(), (Clock::now() - start).count()});
        }
        publish(worker, static_cast<int32_t>(place) + 1);
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }

  void run_all() {
    BorrowedWorkers helpers(workers.size() - 1);
    num_helpers = static_cast<int>(workers.size()) - 1;
    for (int32_t worker = 1; worker < static_cast<int32_t>(workers.size()); ++worker) {
      // A worker goes back to the pool when this run ends, so the run waits for all of them even
      // where one has failed.
      helpers[worker - 1].start([this, worker] {
        run_worker(worker);
        const std::lock_guard lock(mutex);
        --num_helpers;
        changed.notify_all();
      });
    }
    run_worker(0);
    if (workers.size() > 1) {
      const auto are_done = [&] { return num_helpers == 0; };
      for (bool done = false; !done;) {
        {
          std::unique_lock lock(mutex);
          done = changed.wait_for(lock, kInterruptPeriod, are_done);
        }
        if (!done) {
          poll();
        }
      }
    }
  }

  // Sets `starts` for a run; addresses are worked out from it, so that a region may move between
  // runs (a caller's arrays) while everything checked stays checked. Throws Error for a region that
  // cannot lie where it is said to.
  void place_regions(const ReboundRegions& rebound) {
    for (size_t r = 0; r < regions.size(); ++r) {
      starts[r] = static_cast<std::byte*>(regions[r].first);
    }
    for (auto entry = rebound.begin(); entry != rebound.end(); ++entry) {
      const auto& [index, region] = *entry;
      require(index >= 0 && index < static_cast<int32_t>(regions.size()), "region ", index,
              " is rebound, but there are ", regions.size(), ".");
      require(std::none_of(rebound.begin(), entry, [&](const auto& e) { return e.first == index; }),
              "region ", index, " is rebound twice; name it once a run.");
      require(region.first != nullptr, "region ", index,
              " is rebound to a null pointer; give it memory.");
      require(region.second >= regions[index].second, "region ", index, " is rebound to ",
              region.second, " bytes, but needs at least the ", regions[index].second,
              " of the region that it replaces.");
      starts[index] = static_cast<std::byte*>(region.first);
    }
  }

  void reset(int64_t new_base, bool new_record, const std::function<bool()>& new_interrupted) {
    base = new_base;
    record = new_record;
    interrupted = &new_interrupted;
    stop.store(false);
    first_error = nullptr;
    for (size_t w = 0; w < workers.size(); ++w) {
      progress[w].num_finished.store(0);
      events[w].clear();
      if (record) {  // room now, so that recording allocates nothing between tasks
        events[w].reserve(workers[w].size());
      }
    }
    start = Clock::now();
    next_poll = start + kInterruptPeriod;
  }
};

Execution::Execution(std::vector<Instance*> instances, std::vector<Region> regions,
                     std::vector<Task> tasks, std::vector<std::vector<int32_t>> workers,
                     int threads_per_worker)
    : impl_(std::make_unique<Impl>()) {
  require(threads_per_worker == 1 || threads_per_worker == pool_threads(),
          "threads_per_worker must be 1 or ", pool_threads(),
          ", the size of the thread pool, but was ", threads_per_worker, ".");
  Impl& impl = *impl_;
  impl.order = order_schedule(tasks, workers, instances);
  impl.instances = std::move(instances);
  impl.tasks = std::move(tasks);
  impl.workers = std::move(workers);
  impl.threads_per_worker = threads_per_worker;
  for (size_t t = 0; t < impl.tasks.size(); ++t) {
    const std::string name = text(TaskText{impl.tasks, impl.instances, static_cast<int32_t>(t)});
    if (impl.tasks[t].copy.has_value()) {
      check_copy(*impl.tasks[t].copy, regions, name);
      impl.prepared.emplace_back();
      continue;
    }
    impl.prepared.emplace_back(impl.tasks[t], *impl.instances[impl.tasks[t].instance]->impl_,
                               regions, name, impl.limit);
  }
  // After every task is checked: it runs methods.
  for (size_t t = 0; t < impl.tasks.size(); ++t) {
    impl.make_room(impl.tasks[t]);
  }
  impl.starts.resize(regions.size());
  impl.regions = std::move(regions);
  impl.progress = std::make_unique<Progress[]>(impl.workers.size());
  impl.events.resize(impl.workers.size());
  // With more workers than processors, spinning takes time from the one that is waited for.
  impl.spins = std::thread::hardware_concurrency() >= impl.workers.size();
}

Execution::~Execution() = default;

void Execution::run(int64_t base, Timeline* timeline, const std::function<bool()>& interrupted,
                    const ReboundRegions& rebound) {
  Impl& impl = *impl_;
  require(base >= 0 && base <= impl.limit.max_base, "a run cannot start at ", base,
          " tokens: it must be between 0 and ", impl.limit.max_base,
          impl.limit.reason.empty() ? "" : ", for ", impl.limit.reason, ".");
  require(!impl.running.exchange(true),
          "this execution runs already on another thread; prepare a second one, with its own "
          "instances.");
  std::exception_ptr error;
  try {
    // Held for the whole run: with one thread set, workers run side by side without the pool's
    // lock.
    const IntraOpScope scope(impl.threads_per_worker);
    impl.reset(base, timeline != nullptr, interrupted);
    impl.place_regions(rebound);
    impl.run_all();
    error = std::exchange(impl.first_error, nullptr);
  } catch (...) {
    error = std::current_exception();
  }
  if (timeline != nullptr) {
    timeline->events.clear();
    for (const auto& events : impl.events) {
      timeline->events.insert(timeline->events.end(), events.begin(), events.end());
    }
  }
  impl.running.store(false);
  if (error != nullptr) {
    std::rethrow_exception(error);
  }
}

int64_t Execution::max_base() const { return impl_->limit.max_base; }

size_t Execution::num_tasks() const { return impl_->tasks.size(); }

int Execution::num_workers() const { return static_cast<int>(impl_->workers.size()); }

std::vector<int32_t> Execution::num_finished() const {
  std::vector<int32_t> result;
  for (size_t w = 0; w < impl_->workers.size(); ++w) {
    result.push_back(impl_->progress[w].num_finished.load(std::memory_order_relaxed));
  }
  return result;
}

}  // namespace doubleweave

#include "doubleweave/scheduling/planner.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <set>

namespace doubleweave::scheduling {
namespace {

// A choice must promise this much more than a simpler one to be taken: less is within the noise of
// what it was measured with.
constexpr double kWorth = 0.01;
constexpr std::array kLengths{1,   2,   4,   8,   16,  24,   32,   48,   64,   96,   128,
                              192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192};
// Chunks below this size are not worth planning for where they may have any size.
constexpr int kLeastChunk = 16;
// Nor are so small ones of a fixed size that a prompt has more than this many.
constexpr int kMostChunks = 256;

std::vector<int32_t> devices_of(const TaskGraph& graph, const std::vector<CallCosts>& calls) {
  std::vector<int32_t> found;
  found.reserve(graph.size());
  for (const int32_t call : graph.call_of) {
    found.push_back(calls[static_cast<size_t>(call)].device);
  }
  return found;
}

Tasks view_of(const TaskGraph& graph, const std::vector<int32_t>& device,
              const std::vector<std::string>& devices) {
  return {graph.call_of, graph.chunk_of, graph.after_starts, graph.after, device, devices};
}

}  // namespace

std::vector<int> lengths_up_to(int most) {
  std::vector<int> found(kLengths.begin(), std::ranges::lower_bound(kLengths, most));
  found.push_back(most);
  return found;
}

Planner::Planner(Outline outline, Machine machine)
    : outline_(std::move(outline)), machine_(std::move(machine)) {}

bool Planner::is_described_chip() const {
  return !machine_.most_tasks.empty() &&
         std::ranges::none_of(machine_.most_tasks, [](int count) { return count == 0; });
}

int Planner::default_threads(int cores, int most) const {
  int threads = cores;
  if (machine_.threads != 0) {
    threads = machine_.threads;
  } else if (is_described_chip()) {
    // Other devices take none of the CPU's cores.
    const auto cpu = std::ranges::find(outline_.devices, "cpu");
    threads = cpu == outline_.devices.end()
                  ? std::accumulate(machine_.most_tasks.begin(), machine_.most_tasks.end(), 0)
                  : machine_.most_tasks[static_cast<size_t>(cpu - outline_.devices.begin())];
  }
  return std::min(threads, most);
}

std::vector<Chunk> Planner::chunks_of(const Choice& choice, int num_tokens) const {
  return cut(num_tokens, outline_.rows, choice.abreast, choice.chunk);
}

Choice Planner::settled(const Choice& fixed, int threads, int num_tokens) const {
  if (fixed.workers.size() == 1 || chunks_of(fixed, num_tokens).size() > 1) {
    return fixed;
  }
  return choice_of({"sequential", {}, fixed.chunk, threads});
}

PlannedRun Planner::run(const Choice& choice, int num_tokens) const {
  PlannedRun run;
  run.choice = choice;
  std::vector<Chunk> chunks = chunks_of(choice, num_tokens);
  const int abreast = num_abreast(choice, outline_.static_device, chunks.size());
  run.graph =
      repeat(outline_.pattern, outline_.scratch, std::move(chunks), choice.in_flight, abreast);
  run.costs = costs_of(machine_.costs, outline_.calls, run.graph, choice.threads,
                       static_cast<int>(choice.workers.size()), false, 0);
  const std::vector<int32_t> devices = devices_of(run.graph, outline_.calls);
  run.schedule = make_schedule(choice.schedule, view_of(run.graph, devices, outline_.devices),
                               choice.workers, run.costs);
  return run;
}

bool Planner::has_too_many(const Choice& choice) const {
  for (size_t device = 0; device < machine_.most_tasks.size(); ++device) {
    const auto workers = std::ranges::count_if(choice.workers, [&](const std::string& worker) {
      return worker == kAny || worker == outline_.devices[device];
    });
    if (machine_.most_tasks[device] != 0 && workers > machine_.most_tasks[device]) {
      return true;
    }
  }
  return false;
}

std::vector<int> Planner::chunk_sizes(int num_tokens) const {
  std::vector<int> sizes = outline_.rows.fixed;
  if (sizes.empty()) {
    const int most = outline_.rows.most;
    sizes = {most, most / 2, most / 4};
    std::erase_if(sizes, [](int size) { return size < kLeastChunk; });
    return sizes.empty() ? std::vector<int>{most} : sizes;
  }
  std::ranges::sort(sizes, std::greater<>());
  const int largest = sizes.front();
  std::erase_if(sizes, [&](int size) { return num_tokens > size * kMostChunks; });
  return sizes.empty() ? std::vector<int>{largest} : sizes;
}

std::vector<Choice> Planner::with_workers(const std::string& name, int threads, int chunk) const {
  std::set<int> counts;
  if (name == "sequential") {
    counts = {1, threads};
  } else if (threads > 1 && name == "lockstep") {
    counts = {2};
  } else if (threads > 1) {
    counts = {2, threads};
    for (int count = 2; count < threads; count *= 2) {
      counts.insert(count);
    }
  }
  std::vector<Choice> found;
  for (const int count : counts) {
    found.push_back(choice_of({name, {}, chunk, count}));
  }
  return found;
}

// A worker a device, the CPU's with all of its threads: for devices that share no cores with it.
std::optional<Choice> Planner::apart(const std::string& name, int threads, int chunk) const {
  const auto& devices = outline_.devices;
  const auto cpu = std::ranges::find(devices, "cpu") - devices.begin();
  const int cores = static_cast<size_t>(cpu) < machine_.most_tasks.size()
                        ? machine_.most_tasks[static_cast<size_t>(cpu)]
                        : 0;
  if (name == "sequential" || name == "wavefront" || devices.size() < 2 || cores == 0) {
    return std::nullopt;
  }
  Choice choice = choice_of({name, devices, chunk, static_cast<int>(devices.size())});
  choice.threads = std::min(cores, threads);
  return choice;
}

std::vector<Choice> Planner::candidates(int num_tokens, int threads) const {
  std::set<std::pair<Choice, std::vector<int>>> seen;
  std::vector<Choice> found;
  for (const int chunk : chunk_sizes(num_tokens)) {
    for (const char* name : kSchedules) {
      std::vector<Choice> tried = with_workers(name, threads, chunk);
      if (const auto choice = apart(name, threads, chunk)) {
        tried.push_back(*choice);
      }
      for (const Choice& choice : tried) {
        const std::vector<Chunk> chunks = chunks_of(choice, num_tokens);
        if (has_too_many(choice) || (choice.schedule != "sequential" && chunks.size() == 1)) {
          continue;
        }
        std::vector<int> sizes;
        for (const Chunk& one : chunks) {
          sizes.push_back(one.compiled_size);
        }
        // Limits that cut the prompt alike are one candidate.
        Choice without_limit = choice;
        without_limit.chunk = 0;
        if (seen.emplace(std::move(without_limit), std::move(sizes)).second) {
          found.push_back(choice);
        }
      }
    }
  }
  return found;
}

Choice Planner::best(int num_tokens, int threads) const {
  const std::vector<Choice> tried = candidates(num_tokens, threads);
  std::vector<int64_t> ends;
  for (const Choice& choice : tried) {
    const PlannedRun planned = run(choice, num_tokens);
    const std::vector<int32_t> devices = devices_of(planned.graph, outline_.calls);
    const Times times = times_of(planned.schedule,
                                 view_of(planned.graph, devices, outline_.devices), planned.costs);
    ends.push_back(*std::ranges::max_element(times.end_ns));
  }
  const auto shortest = static_cast<double>(*std::ranges::min_element(ends));
  const auto chosen = std::ranges::find_if(
      ends, [&](int64_t end) { return static_cast<double>(end) <= shortest * (1 + kWorth); });
  return tried[static_cast<size_t>(chosen - ends.begin())];
}

}  // namespace doubleweave::scheduling

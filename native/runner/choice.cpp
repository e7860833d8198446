#include "choice.h"

#include <algorithm>
#include <utility>

#include "doubleweave/error.h"

namespace doubleweave::runner {

namespace {

constexpr int kInFlight = 8;
constexpr int kLeastRows = 32;
constexpr int kCallRows = 8;

std::vector<std::string> devices_of(const RunFile& file) {
  std::vector<std::string> devices;
  for (const Segment& segment : file.segments) {
    if (std::find(devices.begin(), devices.end(), segment.device) == devices.end()) {
      devices.push_back(segment.device);
    }
  }
  return devices;
}

std::vector<std::string> default_workers(const RunFile& file, const std::string& schedule,
                                         int threads) {
  std::vector<std::string> devices = devices_of(file);
  if (schedule == "sequential" || (threads == 1 && devices.size() == 1)) {
    return {kAny};
  }
  const auto count = static_cast<size_t>(threads);
  if (schedule == "wavefront") {
    return std::vector<std::string>(count, kAny);
  }
  if (devices.size() == 1) {
    return std::vector<std::string>(schedule == "lockstep" ? 2 : count, devices[0]);
  }
  const bool has_cpu = std::find(devices.begin(), devices.end(), "cpu") != devices.end();
  if (has_cpu && schedule != "lockstep") {
    devices.resize(std::max(devices.size(), count), "cpu");
  }
  return devices;
}

Choice default_choice(const RunFile& file, const Wish& wish, const std::string& schedule) {
  Choice choice;
  choice.schedule = schedule;
  choice.workers =
      wish.workers.empty() ? default_workers(file, schedule, wish.threads) : wish.workers;
  const int workers = static_cast<int>(choice.workers.size());
  choice.threads = workers == 1 ? wish.threads : 1;
  choice.chunk = wish.chunk.value_or(file.most_rows);
  choice.in_flight = schedule == "sequential"  ? 1
                     : schedule == "lockstep"  ? 2
                     : schedule == "wavefront" ? 2 * workers
                                               : kInFlight;
  choice.abreast = schedule == "wavefront" ? workers : 1;
  return choice;
}

/// As many chunks of equal size as the workers can share evenly.
std::vector<int> even_sizes(int num_tokens, int most, int workers) {
  int count = (num_tokens + most - 1) / most;
  if (workers > 1) {
    const int rounded = (count + workers - 1) / workers * workers;
    count = std::max(count, std::min(rounded, std::max(num_tokens / kLeastRows, 1)));
  }
  std::vector<int> sizes(static_cast<size_t>(count), num_tokens / count);
  for (int i = 0; i < num_tokens % count; ++i) {
    ++sizes[static_cast<size_t>(i)];
  }
  return sizes;
}

/// The cheapest sequence of fixed sizes that covers the tokens, counting padding and calls.
std::vector<int> fixed_sizes(int num_tokens, const std::vector<int>& sizes) {
  const int largest = sizes.back();
  const int full = std::max(0, num_tokens / largest - 1);
  const int rest = num_tokens - full * largest;
  std::vector<std::pair<int, std::vector<int>>> best(static_cast<size_t>(rest) + 1);
  for (int tokens = 1; tokens <= rest; ++tokens) {
    std::optional<std::pair<int, std::vector<int>>> cheapest;
    for (const int size : sizes) {
      auto option = best[static_cast<size_t>(std::max(0, tokens - size))];
      option.first += size + kCallRows;
      option.second.push_back(size);
      if (!cheapest || option < *cheapest) {
        cheapest = std::move(option);
      }
    }
    best[static_cast<size_t>(tokens)] = std::move(*cheapest);
  }
  std::vector<int> found(static_cast<size_t>(full), largest);
  auto& tail = best[static_cast<size_t>(rest)].second;
  std::sort(tail.begin(), tail.end(), std::greater<>());
  found.insert(found.end(), tail.begin(), tail.end());
  return found;
}

}  // namespace

void check_wish(const RunFile& file, const Wish& wish) {
  if (wish.schedule != "auto" && !is_schedule(wish.schedule)) {
    std::string known = "auto";
    for (const char* name : kSchedules) {
      known += std::string(", ") + name;
    }
    throw Error("schedule: found '" + wish.schedule + "', expected one of " + known);
  }
  if (wish.schedule == "auto" && (!wish.workers.empty() || wish.chunk)) {
    throw Error(std::string(wish.chunk ? "chunk" : "workers") +
                ": is chosen by schedule auto; name a schedule");
  }
  const std::vector<std::string> devices = devices_of(file);
  for (const std::string& worker : wish.workers) {
    if (worker != kAny && std::find(devices.begin(), devices.end(), worker) == devices.end()) {
      std::string known;
      for (const std::string& device : devices) {
        known += device + " or ";
      }
      throw Error("workers: found '" + worker + "', expected " + known + kAny);
    }
  }
}

Choice choose(const RunFile& file, const Wish& wish, int num_tokens) {
  if (wish.schedule != "auto") {
    Choice fixed = default_choice(file, wish, wish.schedule);
    if (fixed.workers.size() == 1 || cut(file, fixed, num_tokens).size() > 1) {
      return fixed;
    }
    // A single chunk has nothing to overlap: it runs with every thread in every method.
    Wish alone = wish;
    alone.workers.clear();
    return default_choice(file, alone, "sequential");
  }
  if (!file.decisions.empty() && file.threads == wish.threads) {
    for (const Decision& decision : file.decisions) {
      if (num_tokens <= decision.tokens) {
        return decision.choice;
      }
    }
    return file.decisions.back().choice;
  }
  Choice wave = default_choice(file, wish, file.overlapping);
  return num_tokens > wave.chunk / 2 && wish.threads > 1 ? wave
                                                         : default_choice(file, wish, "sequential");
}

std::vector<Chunk> cut(const RunFile& file, const Choice& choice, int num_tokens) {
  const int limit = std::min(choice.chunk, file.most_rows);
  std::vector<int> found;
  if (file.sizes.empty()) {
    found = even_sizes(num_tokens, limit, choice.abreast);
  } else {
    std::vector<int> sizes = file.sizes;
    std::sort(sizes.begin(), sizes.end());
    const int most = std::max(limit, sizes.front());
    std::erase_if(sizes, [&](int size) { return size > most; });
    found = fixed_sizes(num_tokens, sizes);
  }
  std::vector<Chunk> chunks;
  int start = 0;
  for (const int size : found) {
    const int tokens = std::min(size, num_tokens - start);
    chunks.push_back({start, tokens, size});
    start += tokens;
  }
  return chunks;
}

}  // namespace doubleweave::runner

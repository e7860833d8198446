#include "doubleweave/scheduling/choice.h"

#include <algorithm>

namespace doubleweave::scheduling {
namespace {

// Chunks that may be on their way at once where the schedule does not say: their buffers are
// memory.
constexpr int kInFlight = 8;

bool has(const std::vector<std::string>& words, const std::string& word) {
  return std::ranges::find(words, word) != words.end();
}

// One worker a device, further ones for the CPU. A wavefront's and a sequential run's workers do
// everything.
std::vector<std::string> default_workers(const std::vector<std::string>& devices,
                                         const std::string& schedule, int threads) {
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
  std::vector<std::string> workers = devices;
  if (has(devices, "cpu") && schedule != "lockstep") {
    workers.resize(std::max(devices.size(), count), "cpu");
  }
  return workers;
}

[[noreturn]] void refuse_schedule(const std::string& name) {
  throw InputError("schedule: found '" + name + "', expected one of " + kAuto + ", " +
                   joined({kSchedules.begin(), kSchedules.end()}, ", "));
}

}  // namespace

std::string joined(const std::vector<std::string>& words, const char* between) {
  std::string text;
  for (const std::string& word : words) {
    text += (text.empty() ? "" : between) + word;
  }
  return text;
}

bool is_schedule(const std::string& name) {
  return std::ranges::find(kSchedules, name) != kSchedules.end();
}

void check_wish(const Wish& wish, const std::vector<std::string>& devices) {
  const bool is_auto = wish.schedule == kAuto;
  if (!is_auto && !is_schedule(wish.schedule)) {
    refuse_schedule(wish.schedule);
  }
  const std::string chooses = " with schedule auto, which chooses them; name a schedule";
  if (is_auto && !wish.workers.empty()) {
    throw InputError("workers: found " + joined(wish.workers, ",") + chooses);
  }
  if (is_auto && wish.chunk) {
    throw InputError("chunk: found " + std::to_string(*wish.chunk) + chooses);
  }
  const bool is_one = wish.schedule == kSchedules[0];
  if (is_one && !wish.workers.empty() && wish.workers != std::vector<std::string>{kAny}) {
    throw InputError("workers: found " + joined(wish.workers, ",") +
                     " with schedule sequential, whose one worker runs everything; leave them "
                     "out, or name another schedule");
  }
  for (const std::string& worker : wish.workers) {
    if (worker != kAny && !has(devices, worker)) {
      throw InputError("workers: found '" + worker + "', expected " + joined(devices, ", ") +
                       " or " + kAny);
    }
  }
  if (wish.chunk && *wish.chunk < 1) {
    throw InputError("chunk: found " + std::to_string(*wish.chunk) + ", expected at least 1");
  }
  if (wish.threads < 1) {
    throw InputError("threads: found " + std::to_string(wish.threads) + ", expected at least 1");
  }
}

Choice default_choice(const Wish& wish, const std::vector<std::string>& devices, int most_rows) {
  if (wish.schedule == kAuto) {
    refuse_schedule(wish.schedule);
  }
  check_wish(wish, devices);
  Choice choice;
  choice.schedule = wish.schedule;
  choice.workers =
      wish.workers.empty() ? default_workers(devices, wish.schedule, wish.threads) : wish.workers;
  const int workers = static_cast<int>(choice.workers.size());
  choice.threads = workers == 1 ? wish.threads : 1;
  choice.chunk = wish.chunk.value_or(most_rows);
  choice.in_flight = wish.schedule == "sequential"  ? 1
                     : wish.schedule == "lockstep"  ? 2
                     : wish.schedule == "wavefront" ? 2 * workers
                                                    : kInFlight;
  choice.abreast = wish.schedule == "wavefront" ? workers : 1;
  return choice;
}

}  // namespace doubleweave::scheduling

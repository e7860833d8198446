// How a prompt is run: schedule, workers, threads, chunks. Knows nothing of costs or memory.
#pragma once

#include <array>
#include <compare>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace doubleweave::scheduling {

/// A user's mistake: an option that does not exist or does not fit the program.
class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// The device of a worker that runs the tasks of every device.
inline const std::string kAny = "any";
/// The schedule that is chosen by length, threads and machine.
inline const std::string kAuto = "auto";
inline constexpr std::array<const char*, 5> kSchedules{"sequential", "lockstep", "pipelined",
                                                       "out_of_order", "wavefront"};
bool is_schedule(const std::string& name);
/// The words with `between` between them.
std::string joined(const std::vector<std::string>& words, const char* between);

/// `threads` is the number of each worker's methods. `chunk` is the most tokens of a chunk.
/// `in_flight` chunks have buffers at once. `abreast` divides the number of chunks where they may
/// have any size, so that each worker of a wavefront gets as many.
struct Choice {
  std::string schedule;
  std::vector<std::string> workers;
  int threads = 1;
  int chunk = 0;
  int in_flight = 1;
  int abreast = 1;
  auto operator<=>(const Choice&) const = default;
};

/// What the user asks for; kAuto chooses everything but `threads`, which are those in all.
struct Wish {
  std::string schedule = kAuto;
  std::vector<std::string> workers;  // empty: those of the schedule
  std::optional<int> chunk;
  int threads = 1;
};

/// Throws InputError for an unknown schedule, a worker that is none of the program's `devices`, a
/// chunk or a number of threads below 1, and for workers or a chunk beside kAuto, which chooses
/// them.
void check_wish(const Wish& wish, const std::vector<std::string>& devices);

/// The choice that the name of a schedule and a number of threads stand for. `devices` are the
/// program's, in order of use; `most_rows` the most tokens of its chunks. Throws InputError as
/// check_wish does.
Choice default_choice(const Wish& wish, const std::vector<std::string>& devices, int most_rows);

}  // namespace doubleweave::scheduling

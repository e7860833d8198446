// From a program, a machine and a wish to a schedule. Every way to run or predict a prompt goes
// through here.
#pragma once

#include <limits>
#include <map>
#include <mutex>

#include "doubleweave/scheduling/schedule.h"

namespace doubleweave::scheduling {

/// The parts of a language model's program that scheduling depends on.
struct Outline {
  RowSizes rows;                     // of the segments that append to the cache
  std::vector<std::string> devices;  // of the segments, in order
  std::string static_device;         // of the segments that append to the cache
  std::vector<CallCosts> calls;
  Pattern pattern;
  Scratch scratch;
  int max_tokens = 0;  // of the context
};

/// The choice for prompts of up to `tokens` tokens, and more than the decision before.
struct Decision {
  int tokens;
  Choice choice;
};

/// A machine's costs, and the decisions made on it with `threads` threads in all (0: no decisions
/// name a number).
struct Machine {
  CostTables costs;
  std::vector<int> most_tasks;  // that run at once on each device; 0: any number
  std::string overlapping;      // the schedule of several chunks where nothing was decided
  int threads = 0;
  std::vector<Decision> decisions;
};

/// A prompt's run, ready to be verified and bound.
struct PlannedRun {
  Choice choice;
  TaskGraph graph;
  Costs costs;
  Schedule schedule;
};

class Planner {
 public:
  Planner(Outline outline, Machine machine);

  /// The threads in all where the user names no number: the decisions' number; else the number of
  /// tasks that a described chip's CPU runs at once; else `cores`, this machine's. Never more than
  /// `most`.
  int default_threads(int cores, int most = std::numeric_limits<int>::max()) const;

  /// The choice for a prompt of that many tokens. Throws InputError as check_wish does.
  ///
  /// kAuto looks decisions up. Without decisions for as many threads it plans for a chip that is
  /// described (every device says how many tasks it runs at once), at the next longer length of a
  /// grid. For any other machine a short prompt runs on every thread and several chunks run by
  /// `overlapping`; it plans there as well where that gives a device too many workers.
  Choice choose(const Wish& wish, int num_tokens);

  /// `fixed`, or for a prompt of a single chunk its sequential counterpart: a single chunk has
  /// nothing to overlap, so it runs with every thread in every method.
  Choice settled(const Choice& fixed, int threads, int num_tokens) const;

  /// Cuts a prompt as a choice says.
  std::vector<Chunk> chunks_of(const Choice& choice, int num_tokens) const;

  /// The run of a choice.
  PlannedRun run(const Choice& choice, int num_tokens) const;

  /// Every choice worth a try on so many threads in all, simple ones first; none gives a device
  /// more workers than it runs tasks at once.
  std::vector<Choice> candidates(int num_tokens, int threads) const;

  /// Of the candidates the simplest within 1 % of the fastest.
  Choice best(int num_tokens, int threads) const;

  const Outline& outline() const { return outline_; }

 private:
  Choice choice_of(const Wish& wish) const {
    return default_choice(wish, outline_.devices, outline_.rows.most);
  }
  bool is_described_chip() const;
  bool has_too_many(const Choice& choice) const;
  std::vector<Choice> with_workers(const std::string& name, int threads, int chunk) const;
  std::optional<Choice> apart(const std::string& name, int threads, int chunk) const;
  std::vector<int> chunk_sizes(int num_tokens) const;

  const Outline outline_;
  const Machine machine_;
  std::mutex mutex_;
  std::map<std::pair<int, int>, Choice> planned_;  // by length and threads
};

/// The lengths that decisions are made for, `most` the last.
std::vector<int> lengths_up_to(int most);

}  // namespace doubleweave::scheduling

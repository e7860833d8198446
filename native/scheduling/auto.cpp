// How a prompt is run where the user leaves it open: decisions that were measured, else a plan,
// else a rule.
#include <algorithm>

#include "doubleweave/scheduling/planner.h"

namespace doubleweave::scheduling {

Choice Planner::choose(const Wish& wish, int num_tokens) {
  check_wish(wish, outline_.devices);
  if (wish.schedule != kAuto) {
    return settled(choice_of(wish), wish.threads, num_tokens);
  }
  if (!machine_.decisions.empty() && machine_.threads == wish.threads) {
    const auto found = std::ranges::find_if(machine_.decisions, [&](const Decision& decision) {
      return num_tokens <= decision.tokens;
    });
    return (found == machine_.decisions.end() ? machine_.decisions.back() : *found).choice;
  }
  const Choice several = choice_of({machine_.overlapping, {}, {}, wish.threads});
  if (is_described_chip() || has_too_many(several)) {
    const std::vector<int> lengths = lengths_up_to(outline_.max_tokens);
    const auto length = std::ranges::find_if(lengths, [&](int most) { return num_tokens <= most; });
    // At the next length of a grid, so that a session plans a handful of times, not at every
    // prompt.
    const std::pair key(length == lengths.end() ? lengths.back() : *length, wish.threads);
    const std::lock_guard lock(mutex_);
    const auto known = planned_.find(key);
    return known != planned_.end()
               ? known->second
               : planned_.emplace(key, best(key.first, key.second)).first->second;
  }
  return num_tokens > several.chunk / 2 && wish.threads > 1
             ? several
             : choice_of({"sequential", {}, {}, wish.threads});
}

}  // namespace doubleweave::scheduling

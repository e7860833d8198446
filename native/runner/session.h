// A prompt in, logits out, over a cache that stays: the counterpart of the Python package's
// runtime/llm.
#pragma once

#include "doubleweave/buffers.h"
#include "doubleweave/execution.h"
#include "doubleweave/kv_cache.h"
#include "doubleweave/packed_weights.h"
#include "run_file.h"

namespace doubleweave::runner {

/// A run of so many tokens, ready to be repeated. `order` is its schedule without barriers.
struct Prepared {
  scheduling::PlannedRun run;
  scheduling::Ordered order;
  std::unique_ptr<Buffers> buffers;  // of the lanes' slots, then of the last chunk's output
  std::vector<int64_t> input_ids;
  std::unique_ptr<Execution> execution;
};

class Session {
 public:
  /// Throws Error for a damaged program, or a program of another size than run.json says. `file`
  /// and `planner` must outlive it.
  Session(const std::filesystem::path& folder, const RunFile& file, scheduling::Planner& planner,
          scheduling::Wish wish);

  /// Appends tokens and returns the logits of the last one; they stay until the next call. With
  /// `timeline` the run is recorded. Throws Error for no tokens, ids out of range, or more tokens
  /// than the context has room for.
  std::span<const float> append(std::span<const int64_t> ids, Timeline* timeline = nullptr);

  /// Tokens in the cache.
  int length() const { return static_cast<int>(cache_.length()); }
  size_t kv_bytes_peak() const;
  /// The run of the last append.
  const Prepared& last() const { return *last_; }

 private:
  std::span<const float> run(std::span<const int64_t> ids, Timeline* timeline);
  void change_frequencies(int64_t num_tokens);
  void clear();
  Prepared& prepare(int num_tokens);
  void load(const Prepared& prepared);
  Instance* instance(const std::string& method, int copy);
  std::string method_of(const Prepared& prepared, int call, int chunk) const;
  std::vector<Task> tasks_of(const Prepared& prepared, std::vector<Instance*>& loaded);
  Binding bind(const Prepared& prepared, const Segment& segment, int value,
               const std::vector<int32_t>& shape, int chunk, int rows, int first,
               bool writes) const;
  std::vector<Region> regions(Prepared& prepared);

  const RunFile& file_;
  scheduling::Planner& planner_;
  scheduling::Wish wish_;
  Program program_;
  PackedWeights packed_;
  KvCache cache_;
  Buffers states_;                  // two copies of each, zero before the first token
  std::vector<int> region_of_;      // of each input, cache and state, behind the buffers
  std::vector<int64_t> positions_;  // p by the short frequencies is p, by the long ones ~p
  bool is_long_ = false;
  std::vector<int64_t> ids_;  // of all tokens in the cache, where frequencies may change
  std::map<std::pair<std::string, int>, std::unique_ptr<Instance>> instances_;
  std::map<int, std::unique_ptr<Prepared>> prepared_;
  Prepared* last_ = nullptr;
};

/// One line a worker, as Schedule.text of the Python package writes it.
std::string schedule_text(const RunFile& file, const Prepared& prepared);

}  // namespace doubleweave::runner

// Weights as XNNPACK packs them, in files that are mapped: made when a large program is opened
// first.
//
// XNNPACK lays weights out anew for the processor's kernels whenever a method is loaded, which
// takes a second for a gigabyte, and holds them in memory of its own. A file a method has the
// result, for one program, one build of XNNPACK and one kind of processor; all processes map the
// same file. A file that was changed since it was written is not used, and neither is one that was
// not written to its end. Knows nothing of manifests and run files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "doubleweave/program.h"

namespace doubleweave {

/// The packed weights of one program.
class PackedWeights {
 public:
  /// Of a program's weights: less is packed in a moment.
  static constexpr uint64_t kLeastBytes = uint64_t{256} << 20;
  /// Of all programs' packed weights together.
  static constexpr uint64_t kMostBytes = uint64_t{16} << 30;

  /// Keeps none.
  PackedWeights() = default;

  /// Those of the program with this SHA-256 in a cache folder; `name` is what people know the
  /// program by, `weight_bytes` what its weights take. None are kept where they are few or more
  /// than kMostBytes, where the disk has less free than twice as much, or where the folder cannot
  /// be written.
  PackedWeights(const std::filesystem::path& cache, const std::string& sha256,
                const std::string& name, uint64_t weight_bytes);

  bool keeps_any() const { return !folder_.empty(); }

  /// Loads a method as Program::load does, over its file if it has `weight_bytes` enough. Thread
  /// safe. What another process is writing is packed in memory.
  std::unique_ptr<Instance> load(const Program& program, const std::string& method,
                                 int workspace_group, uint64_t weight_bytes) const;

 private:
  std::filesystem::path folder_;
};

/// The packed weights of a program in a cache folder.
struct KeptWeights {
  std::string name;
  uint64_t bytes;
  double used;  // seconds since 1970
  std::filesystem::path folder;
};

/// What a cache folder has, the longest unused first.
std::vector<KeptWeights> kept_weights(const std::filesystem::path& cache);

/// Removes what was not used for longest, until at most so many bytes are left; returns the bytes
/// removed. A program that is running keeps what it has mapped.
uint64_t remove_kept_weights(const std::filesystem::path& cache, uint64_t most_bytes);

}  // namespace doubleweave

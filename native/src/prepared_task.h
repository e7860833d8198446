// A task whose bindings are checked and resolved, but for the tokens in the cache and where the
// regions start.
#pragma once

#include <limits>

#include "doubleweave/execution.h"

namespace doubleweave {

/// The largest base that every binding allows, and the binding that sets it.
struct BaseLimit {
  int64_t max_base = std::numeric_limits<int32_t>::max();
  std::string reason;
};

class PreparedTask {
 public:
  /// Binds nothing; for copies.
  PreparedTask() = default;

  /// Checks the bindings against the instance and the regions for base 0, and lowers `limit` to
  /// what they allow. Throws Error naming `name` where one does not fit.
  PreparedTask(const Task& task, const Instance::Impl& instance, const std::vector<Region>& regions,
               const std::string& name, BaseLimit& limit);

  /// Binds everything for `base` tokens; `starts` says where each region lies in this run. Throws
  /// Error where the instance refuses.
  void bind(Instance::Impl& instance, int64_t base, const std::vector<std::byte*>& starts);

 private:
  struct Address {
    int32_t region;
    int64_t offset;
    size_t bytes;  // from the offset to the end of the region
    int64_t offset_per_token;
    std::vector<int32_t> sizes;
    int32_t grow_dim;
    int32_t first_size;  // sizes[grow_dim] at base 0
  };
  static Address resolve(const Binding& binding, const TensorInfo& info,
                         const std::vector<Region>& regions, const std::string& name,
                         BaseLimit& limit);

  std::vector<Address> inputs_;
  std::vector<Address> outputs_;
};

}  // namespace doubleweave

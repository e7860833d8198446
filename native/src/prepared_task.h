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

  /// Binds everything for a row, behind `base` tokens; `starts` says where each region lies in this
  /// run. Throws Error where the instance refuses.
  void bind(Instance::Impl& instance, int64_t base, int32_t row,
            const std::vector<std::byte*>& starts);

 private:
  struct Address {
    int32_t region;
    int64_t offset;
    size_t region_bytes;
    int64_t offset_per_token;
    std::vector<int32_t> sizes;
    int32_t grow_dim;
    int32_t first_size;  // sizes[grow_dim] at base 0
    int64_t offset_per_row;
    int64_t copy_bytes;
    int32_t first_copy;
    // Bytes from the region's start to where it lies for a row behind `base` tokens.
    int64_t offset_at(int64_t base, int32_t row) const;
  };
  static Address resolve(const Binding& binding, const TensorInfo& info,
                         const std::vector<Region>& regions, int32_t num_rows,
                         const std::string& name, BaseLimit& limit);

  std::vector<Address> inputs_;
  std::vector<Address> outputs_;
};

}  // namespace doubleweave

// What our ExecuTorch kernels share: names, checks of their arguments, and how they become known.
#pragma once

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>

#include "doubleweave/cache_format.h"

// Logs the condition that does not hold and fails the kernel; ExecuTorch's own macro with our
// operator's name.
#define DOUBLEWEAVE_CHECK(context, condition, message)                      \
  do {                                                                      \
    if (!(condition)) {                                                     \
      ET_LOG(Error, "doubleweave: %s does not hold: " message, #condition); \
      (context).fail(et::Error::InvalidArgument);                           \
      return;                                                               \
    }                                                                       \
  } while (false)

namespace doubleweave {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using Stack = et::Span<et::EValue*>;

/// A tensor of a dtype, with memory.
inline bool is_tensor(const et::EValue& value, ScalarType type) {
  return value.isTensor() && value.toTensor().scalar_type() == type &&
         value.toTensor().const_data_ptr() != nullptr;
}

/// The format of a cache whose rows are tensors of a dtype; nothing for other dtypes.
inline std::optional<CacheFormat> cache_format_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return CacheFormat::kFloat32;
    case ScalarType::BFloat16:
      return CacheFormat::kBfloat16;
    case ScalarType::Half:
      return CacheFormat::kFloat16;
    case ScalarType::Char:
      return CacheFormat::kInt8;
    default:
      return std::nullopt;
  }
}

/// Gives a result its sizes, at most 4; false where it has no room for them.
inline bool resize(Tensor& out, std::initializer_list<int64_t> lengths) {
  std::array<int32_t, 4> sizes{};
  size_t rank = 0;
  for (const int64_t length : lengths) sizes[rank++] = static_cast<int32_t>(length);
  return et::resize_tensor(out, {sizes.data(), rank}) == et::Error::Ok;
}

/// Gives a result these leading sizes and one more, that of a row; false where it has no room.
inline bool resize_to_rows(Tensor& out, et::Span<const int32_t> leading, int64_t width) {
  std::array<int32_t, et::kTensorDimensionLimit> sizes{};
  if (leading.size() + 1 > sizes.size()) return false;
  std::copy(leading.begin(), leading.end(), sizes.begin());
  sizes[leading.size()] = static_cast<int32_t>(width);
  return et::resize_tensor(out, {sizes.data(), leading.size() + 1}) == et::Error::Ok;
}

/// Whether every index, int64, is a row of a table of so many.
inline bool are_rows(const Tensor& index, int64_t num_rows) {
  const int64_t* rows = index.const_data_ptr<int64_t>();
  return std::all_of(rows, rows + index.numel(),
                     [&](int64_t row) { return 0 <= row && row < num_rows; });
}

inline void register_kernels(std::initializer_list<et::Kernel> kernels) {
  for (const et::Kernel& kernel : kernels) {
    // Registering a name twice ends the process; another copy of this library may have been first.
    if (!et::registry_has_op_function(kernel.name_)) {
      (void)et::register_kernel(kernel);
    }
  }
}

}  // namespace doubleweave

// The schema is that of src/doubleweave/compiler/graph/table_ops.py:
//   doubleweave::table_rows.out(Tensor table, Tensor scales, Tensor index, *, Tensor(a!) out)
//       -> Tensor(a!)
#include <algorithm>

#include "kernel_helpers.h"
#include "operators.h"

namespace doubleweave {
namespace {

// Gives a result the index's sizes and one more, that of a row.
bool resize_to_rows(Tensor& out, const Tensor& index, int64_t width) {
  std::array<int32_t, et::kTensorDimensionLimit> sizes{};
  const auto rank = static_cast<size_t>(index.dim());
  if (rank + 1 > sizes.size()) return false;
  std::copy(index.sizes().begin(), index.sizes().end(), sizes.begin());
  sizes[rank] = static_cast<int32_t>(width);
  return et::resize_tensor(out, {sizes.data(), rank + 1}) == et::Error::Ok;
}

void table_rows_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 4, "table_rows takes 4 arguments");
  DOUBLEWEAVE_CHECK(context,
                    is_tensor(*stack[0], ScalarType::Char) && stack[0]->toTensor().dim() == 2,
                    "the table is int8 [rows, width]");
  const Tensor& table = stack[0]->toTensor();
  const int64_t num_rows = table.size(0);
  const int64_t width = table.size(1);
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[1], ScalarType::Float) && stack[1]->toTensor().numel() == num_rows,
      "each row has a float32 scale");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[2], ScalarType::Long) && is_tensor(*stack[3], ScalarType::Float),
      "index is int64, out is float32");
  const Tensor& index = stack[2]->toTensor();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  const int64_t count = index.numel();
  DOUBLEWEAVE_CHECK(
      context,
      std::all_of(rows, rows + count, [&](int64_t row) { return 0 <= row && row < num_rows; }),
      "the table has each row");
  Tensor& out = stack[3]->toTensor();
  DOUBLEWEAVE_CHECK(context, resize_to_rows(out, index, width), "out has room for the result");
  const int8_t* values = table.const_data_ptr<int8_t>();
  const float* scales = stack[1]->toTensor().const_data_ptr<float>();
  float* result = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* row = values + rows[i] * width;
    const float scale = scales[rows[i]];
    for (int64_t column = 0; column < width; ++column) {
      result[i * width + column] = static_cast<float>(row[column]) * scale;
    }
  }
}

}  // namespace

void register_table_operators() {
  register_kernels({et::Kernel("doubleweave::table_rows.out", table_rows_kernel)});
}

}  // namespace doubleweave

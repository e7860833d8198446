// The schema is that of src/doubleweave/compiler/graph/table_ops.py:
//   doubleweave::table_rows.out(Tensor table, Tensor? scales, Tensor index, Tensor? offsets,
//       Tensor? offset_scales, *, Tensor(a!) out) -> Tensor(a!)
#include <algorithm>
#include <bit>

#include "doubleweave/linears.h"
#include "kernel_helpers.h"
#include "operators.h"

namespace doubleweave {
namespace {

// A table's rows in one of three formats, by the dtypes of its parts.
struct Table {
  const Tensor* values;
  const Tensor* scales = nullptr;         // null: values are bfloat16
  const Tensor* offsets = nullptr;        // of groups of 4 bits
  const Tensor* offset_scales = nullptr;  // as above
  int64_t width = 0;
};

bool is_matrix(const et::EValue& value, ScalarType type, int64_t rows, int64_t columns) {
  return is_tensor(value, type) && value.toTensor().dim() == 2 &&
         value.toTensor().size(0) == rows && value.toTensor().size(1) == columns;
}

// False where the parts do not belong together.
bool read_table(Stack stack, Table& table) {
  if (!stack[0]->isTensor() || stack[0]->toTensor().dim() != 2) return false;
  table.values = &stack[0]->toTensor();
  const int64_t rows = table.values->size(0);
  const int64_t columns = table.values->size(1);
  const bool has_offsets = !stack[3]->isNone();
  table.width = has_offsets ? 2 * columns : columns;
  if (stack[1]->isNone()) {
    return !has_offsets && is_tensor(*stack[0], ScalarType::BFloat16);
  }
  if (!is_tensor(*stack[0], ScalarType::Char) || !stack[1]->isTensor()) return false;
  table.scales = &stack[1]->toTensor();
  if (!has_offsets) return is_tensor(*stack[1], ScalarType::Float) && table.scales->numel() == rows;
  const int64_t groups = table.width / kLinearGroup;
  if (table.width % kLinearGroup != 0 ||
      !is_matrix(*stack[1], ScalarType::BFloat16, rows, groups) ||
      !is_matrix(*stack[3], ScalarType::Char, rows, groups) ||
      !is_tensor(*stack[4], ScalarType::Float) || stack[4]->toTensor().numel() != rows) {
    return false;
  }
  table.offsets = &stack[3]->toTensor();
  table.offset_scales = &stack[4]->toTensor();
  return true;
}

float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

void read_row(const Table& table, int64_t row, float* out) {
  if (table.scales == nullptr) {
    const auto* from =
        static_cast<const uint16_t*>(table.values->const_data_ptr()) + row * table.width;
    std::transform(from, from + table.width, out, from_bfloat16);
    return;
  }
  if (table.offsets == nullptr) {
    const int8_t* from = table.values->const_data_ptr<int8_t>() + row * table.width;
    const float scale = table.scales->const_data_ptr<float>()[row];
    for (int64_t i = 0; i < table.width; ++i) out[i] = static_cast<float>(from[i]) * scale;
    return;
  }
  const int64_t groups = table.width / kLinearGroup;
  const auto* from =
      static_cast<const uint8_t*>(table.values->const_data_ptr()) + row * table.width / 2;
  const auto* scales = static_cast<const uint16_t*>(table.scales->const_data_ptr()) + row * groups;
  const int8_t* offsets = table.offsets->const_data_ptr<int8_t>() + row * groups;
  const float offset_scale = table.offset_scales->const_data_ptr<float>()[row];
  for (int64_t group = 0; group < groups; ++group) {
    const float scale = from_bfloat16(scales[group]);
    const float offset = static_cast<float>(offsets[group]) * offset_scale;
    for (int64_t i = 0; i < kLinearGroup / 2; ++i, ++from, out += 2) {
      out[0] = static_cast<float>((*from & 15) - 8) * scale + offset;
      out[1] = static_cast<float>((*from >> 4) - 8) * scale + offset;
    }
  }
}

void table_rows_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 6, "table_rows takes 6 arguments");
  Table table{};
  DOUBLEWEAVE_CHECK(context, read_table(stack, table),
                    "the table is bfloat16, int8 with a float32 scale a row, or int4 with a "
                    "bfloat16 scale and an int8 offset for each 32 numbers");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[2], ScalarType::Long) && is_tensor(*stack[5], ScalarType::Float),
      "index is int64, out is float32");
  const Tensor& index = stack[2]->toTensor();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  const int64_t count = index.numel();
  DOUBLEWEAVE_CHECK(context, are_rows(index, table.values->size(0)), "the table has each row");
  Tensor& out = stack[5]->toTensor();
  DOUBLEWEAVE_CHECK(context,
                    resize_to_rows(out, {index.sizes().data(), index.sizes().size()}, table.width),
                    "out has room for the result");
  float* result = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) read_row(table, rows[i], result + i * table.width);
}

}  // namespace

void register_table_operators() {
  register_kernels({et::Kernel("doubleweave::table_rows.out", table_rows_kernel)});
}

}  // namespace doubleweave

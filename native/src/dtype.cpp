#include <algorithm>
#include <array>

#include "doubleweave/program.h"

namespace doubleweave {
namespace {

struct DTypeRow {
  DType dtype;
  const char* name;
  size_t bytes;
};

constexpr std::array<DTypeRow, 11> kDTypes = {{
    {DType::kUInt8, "uint8", 1},
    {DType::kInt8, "int8", 1},
    {DType::kInt16, "int16", 2},
    {DType::kInt32, "int32", 4},
    {DType::kInt64, "int64", 8},
    {DType::kFloat16, "float16", 2},
    {DType::kFloat32, "float32", 4},
    {DType::kFloat64, "float64", 8},
    {DType::kBool, "bool", 1},
    {DType::kBFloat16, "bfloat16", 2},
    {DType::kUInt16, "uint16", 2},
}};

const DTypeRow* find(DType dtype) {
  const auto* row =
      std::ranges::find_if(kDTypes, [&](const DTypeRow& known) { return known.dtype == dtype; });
  return row == kDTypes.end() ? nullptr : row;
}

}  // namespace

std::string dtype_name(DType dtype) {
  const DTypeRow* row = find(dtype);
  return row != nullptr ? row->name : "dtype " + std::to_string(static_cast<int>(dtype));
}

size_t dtype_bytes(DType dtype) {
  const DTypeRow* row = find(dtype);
  return row != nullptr ? row->bytes : 0;
}

}  // namespace doubleweave

// The schema is that of src/doubleweave/compiler/graph/ops.py:
//   doubleweave::cache_rows.out(Tensor x, int num_heads, ScalarType dtype, *, Tensor(a!) out)
//       -> Tensor(a!)
#include "doubleweave/cache_format.h"
#include "kernel_helpers.h"
#include "operators.h"

namespace doubleweave {
namespace {

void cache_rows_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 4, "cache_rows takes 4 arguments");
  DOUBLEWEAVE_CHECK(context,
                    is_tensor(*stack[0], ScalarType::Float) && stack[0]->toTensor().dim() == 3 &&
                        stack[0]->toTensor().size(0) == 1,
                    "x is a float32 tensor [1, rows, columns]");
  DOUBLEWEAVE_CHECK(context, stack[1]->isInt() && stack[3]->isTensor(), "num_heads is a number");
  const Tensor& x = stack[0]->toTensor();
  Tensor& out = stack[3]->toTensor();
  const int64_t num_heads = stack[1]->toInt();
  DOUBLEWEAVE_CHECK(context, num_heads >= 1 && x.size(2) % num_heads == 0,
                    "x's columns are heads times head size");
  const std::optional<CacheFormat> format = cache_format_of(out.scalar_type());
  DOUBLEWEAVE_CHECK(context, format.has_value(), "out has a format of the cache");
  const int64_t dim = x.size(2) / num_heads;
  const bool has_room = *format == CacheFormat::kInt8
                            ? resize(out, {1, x.size(1), num_heads, head_bytes(*format, dim)})
                            : resize(out, {1, x.size(1), x.size(2)});
  DOUBLEWEAVE_CHECK(context, has_room && out.const_data_ptr() != nullptr,
                    "out has room for the result");
  write_cache_heads(*format, x.const_data_ptr<float>(), x.size(1) * num_heads, dim,
                    out.mutable_data_ptr());
}

}  // namespace

void register_cache_operators() {
  register_kernels({et::Kernel("doubleweave::cache_rows.out", cache_rows_kernel)});
}

}  // namespace doubleweave

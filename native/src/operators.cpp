// The schemas are those of src/doubleweave/compiler/graph/ops.py:
//   doubleweave::attention.out(Tensor q, Tensor k, Tensor v, int num_heads, int num_kv_heads,
//       float scale, int window, float soft_cap, *, Tensor(a!) out) -> Tensor(a!)
//   doubleweave::biased_attention.out(… as attention's, int block, Tensor? sinks, Tensor? slopes,
//       Tensor? distances, *, Tensor(a!) out) -> Tensor(a!)
//   doubleweave::cross_attention.out(… as attention's, *, Tensor(a!) out) -> Tensor(a!)
//   doubleweave::rotary.out(Tensor x, Tensor cos, Tensor sin, int num_heads, *, Tensor(a!) out)
//       -> Tensor(a!)
//
// The keys and values of the first two may have a format of the cache (cache_operators.cpp).
#include "operators.h"

#include <algorithm>
#include <mutex>
#include <optional>

#include "doubleweave/attention.h"
#include "doubleweave/rotary.h"
#include "doubleweave/threads.h"
#include "kernel_helpers.h"

namespace doubleweave {
namespace {

// A float32 [1, rows, columns] tensor.
bool is_matrix(const et::EValue& value) {
  if (!value.isTensor()) {
    return false;
  }
  const Tensor& tensor = value.toTensor();
  return tensor.dim() == 3 && tensor.size(0) == 1 && tensor.scalar_type() == ScalarType::Float;
}

// Exported numbers that happen to be whole may arrive as integers.
double number(const et::EValue& value) {
  return value.isDouble() ? value.toDouble() : static_cast<double>(value.toInt());
}

bool all_numbers(Stack stack, size_t begin, size_t end) {
  return std::all_of(stack.begin() + begin, stack.begin() + end,
                     [](const et::EValue* value) { return value->isInt() || value->isDouble(); });
}

// None, or a float32 tensor with a number for each head.
bool is_per_head(const et::EValue& value, int64_t num_heads) {
  if (value.isNone()) return true;
  if (!value.isTensor()) return false;
  const Tensor& tensor = value.toTensor();
  return tensor.dim() == 1 && tensor.size(0) == num_heads &&
         tensor.scalar_type() == ScalarType::Float && tensor.const_data_ptr() != nullptr;
}

// None, or a float32 tensor with at least one number for each head.
bool is_table_per_head(const et::EValue& value, int64_t num_heads) {
  if (value.isNone()) return true;
  if (!value.isTensor()) return false;
  const Tensor& tensor = value.toTensor();
  return tensor.dim() == 2 && tensor.size(0) == num_heads && tensor.size(1) >= 1 &&
         tensor.scalar_type() == ScalarType::Float && tensor.const_data_ptr() != nullptr;
}

const float* per_head(const et::EValue& value) {
  return value.isNone() ? nullptr : value.toTensor().const_data_ptr<float>();
}

// Keys or values: float32, bfloat16 or float16 [1, rows, columns], or int8 [1, rows, heads, bytes].
struct CachedRows {
  CacheFormat format{};
  int64_t head_dim = 0;
};

std::optional<CachedRows> cached_rows(const et::EValue& value, int64_t num_heads) {
  if (!value.isTensor()) return std::nullopt;
  const Tensor& tensor = value.toTensor();
  const std::optional<CacheFormat> format = cache_format_of(tensor.scalar_type());
  if (!format || tensor.dim() < 3 || tensor.size(0) != 1) return std::nullopt;
  if (*format == CacheFormat::kInt8) {
    const int64_t dim = tensor.dim() == 4 ? tensor.size(3) - head_bytes(*format, 0) : 0;
    if (dim < 1 || tensor.size(2) != num_heads) return std::nullopt;
    return CachedRows{*format, dim};
  }
  if (tensor.dim() != 3 || tensor.size(2) % num_heads != 0) return std::nullopt;
  return CachedRows{*format, tensor.size(2) / num_heads};
}

// Attention with what `params` already says; q, k, v and the parameters that follow them are the
// first arguments of every operator.
void attend(et::KernelRuntimeContext& context, Stack stack, AttentionParams params,
            et::EValue& result) {
  DOUBLEWEAVE_CHECK(context, all_numbers(stack, 3, 8), "attention's parameters are numbers");
  DOUBLEWEAVE_CHECK(context, is_matrix(*stack[0]) && is_matrix(result),
                    "q and out are float32 tensors [1, rows, columns]");
  params.num_heads = static_cast<int64_t>(number(*stack[3]));
  params.num_kv_heads = static_cast<int64_t>(number(*stack[4]));
  DOUBLEWEAVE_CHECK(context,
                    params.num_kv_heads >= 1 && params.num_heads >= 1 &&
                        params.num_heads % params.num_kv_heads == 0,
                    "num_kv_heads divides num_heads");
  const std::optional<CachedRows> keys = cached_rows(*stack[1], params.num_kv_heads);
  const std::optional<CachedRows> values = cached_rows(*stack[2], params.num_kv_heads);
  DOUBLEWEAVE_CHECK(context, keys && values && keys->format == values->format,
                    "k and v are rows of heads in one format of the cache");
  params.format = keys->format;
  const Tensor& q = stack[0]->toTensor();
  const Tensor& k = stack[1]->toTensor();
  const Tensor& v = stack[2]->toTensor();
  Tensor& out = result.toTensor();
  params.num_queries = q.size(1);
  params.num_keys = k.size(1);
  params.scale = static_cast<float>(number(*stack[5]));
  params.window = static_cast<int64_t>(number(*stack[6]));
  params.soft_cap = static_cast<float>(number(*stack[7]));
  DOUBLEWEAVE_CHECK(context, params.window >= 0 && params.soft_cap >= 0,
                    "window and soft_cap are not negative");
  DOUBLEWEAVE_CHECK(context,
                    params.num_queries >= 1 && params.num_keys >= 1 &&
                        (!params.causal || params.num_keys >= params.num_queries),
                    "there are at least as many keys as queries");
  DOUBLEWEAVE_CHECK(context, v.size(1) == k.size(1), "k and v have as many rows");
  DOUBLEWEAVE_CHECK(context, q.size(2) == params.num_heads * keys->head_dim,
                    "the columns of q are heads times the head size of k");
  params.head_dim = keys->head_dim;
  params.value_dim = values->head_dim;
  DOUBLEWEAVE_CHECK(context, params.head_dim >= 1 && params.value_dim >= 1, "heads are not empty");
  DOUBLEWEAVE_CHECK(context,
                    resize(out, {1, params.num_queries, params.num_heads * params.value_dim}),
                    "out has room for the result");
  const float* q_data = q.const_data_ptr<float>();
  const void* k_data = k.const_data_ptr();
  const void* v_data = v.const_data_ptr();
  float* out_data = out.mutable_data_ptr<float>();
  DOUBLEWEAVE_CHECK(
      context, q_data != nullptr && k_data != nullptr && v_data != nullptr && out_data != nullptr,
      "every tensor has memory");
  attention(params, q_data, k_data, v_data, out_data, parallel_items);
}

void attention_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 9, "attention takes 9 arguments");
  AttentionParams params{};
  params.causal = true;
  attend(context, stack, params, *stack[8]);
}

void cross_attention_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 9, "cross_attention takes 9 arguments");
  AttentionParams params{};
  params.causal = false;
  attend(context, stack, params, *stack[8]);
}

void biased_attention_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 13, "biased_attention takes 13 arguments");
  DOUBLEWEAVE_CHECK(context, all_numbers(stack, 3, 4) && all_numbers(stack, 8, 9),
                    "num_heads and block are numbers");
  const auto num_heads = static_cast<int64_t>(number(*stack[3]));
  AttentionParams params{};
  params.causal = true;
  params.block = static_cast<int64_t>(number(*stack[8]));
  DOUBLEWEAVE_CHECK(context, params.block >= 0, "block is not negative");
  DOUBLEWEAVE_CHECK(context,
                    is_per_head(*stack[9], num_heads) && is_per_head(*stack[10], num_heads),
                    "sinks and slopes have a float32 number for each head");
  DOUBLEWEAVE_CHECK(context, is_table_per_head(*stack[11], num_heads),
                    "distances have float32 numbers for each head");
  params.sinks = per_head(*stack[9]);
  params.slopes = per_head(*stack[10]);
  if (!stack[11]->isNone()) {
    params.distances = per_head(*stack[11]);
    params.num_distances = stack[11]->toTensor().size(1);
  }
  attend(context, stack, params, *stack[12]);
}

void rotary_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 5, "rotary takes 5 arguments");
  DOUBLEWEAVE_CHECK(context, all_numbers(stack, 3, 4), "num_heads is a number");
  DOUBLEWEAVE_CHECK(
      context,
      is_matrix(*stack[0]) && is_matrix(*stack[1]) && is_matrix(*stack[2]) && is_matrix(*stack[4]),
      "x, cos, sin and out are float32 tensors [1, rows, columns]");
  const Tensor& x = stack[0]->toTensor();
  const Tensor& cos = stack[1]->toTensor();
  const Tensor& sin = stack[2]->toTensor();
  Tensor& out = stack[4]->toTensor();
  const auto num_heads = static_cast<int64_t>(number(*stack[3]));
  const int64_t num_rows = x.size(1);
  const int64_t rotary_dim = cos.size(2);
  DOUBLEWEAVE_CHECK(context, num_heads >= 1 && x.size(2) % num_heads == 0,
                    "x's columns are heads times head size");
  const int64_t head_dim = x.size(2) / num_heads;
  DOUBLEWEAVE_CHECK(context,
                    cos.size(1) == num_rows && sin.size(1) == num_rows && sin.size(2) == rotary_dim,
                    "cos and sin have a row for each row of x");
  DOUBLEWEAVE_CHECK(context, rotary_dim % 2 == 0 && rotary_dim <= head_dim,
                    "an even part of each head turns");
  DOUBLEWEAVE_CHECK(context, resize(out, {1, num_rows, x.size(2)}), "out has room for the result");
  DOUBLEWEAVE_CHECK(context,
                    x.const_data_ptr() != nullptr && cos.const_data_ptr() != nullptr &&
                        sin.const_data_ptr() != nullptr && out.const_data_ptr() != nullptr,
                    "every tensor has memory");
  rotary(x.const_data_ptr<float>(), cos.const_data_ptr<float>(), sin.const_data_ptr<float>(),
         out.mutable_data_ptr<float>(), num_rows, num_heads, head_dim, rotary_dim);
}

}  // namespace

void register_operators() {
  static std::once_flag once;
  std::call_once(once, [] {
    register_kernels({et::Kernel("doubleweave::attention.out", attention_kernel),
                      et::Kernel("doubleweave::biased_attention.out", biased_attention_kernel),
                      et::Kernel("doubleweave::cross_attention.out", cross_attention_kernel),
                      et::Kernel("doubleweave::rotary.out", rotary_kernel)});
    register_linear_operators();
    register_table_operators();
    register_cache_operators();
  });
}

}  // namespace doubleweave

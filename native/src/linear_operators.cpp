// The schemas are those of src/doubleweave/compiler/graph/expert_ops.py and linear_ops.py:
//   doubleweave::expert_linear_packed.out(Tensor x, Tensor index, Tensor weight, Tensor? scales,
//       Tensor? sums, Tensor? offsets, Tensor? offset_scales, Tensor? bias, int in_features,
//       int out_features, *, Tensor(a!) out) -> Tensor(a!)
//   doubleweave::linear_packed.out, the same without index
//   doubleweave::expert_sum.out(Tensor x, Tensor scores, *, Tensor(a!) out) -> Tensor(a!)
#include <algorithm>

#include "doubleweave/linears.h"
#include "file_loader.h"
#include "kernel_helpers.h"
#include "operators.h"

namespace doubleweave {
namespace {

bool is_floats(const et::EValue& value, int64_t numel) {
  return is_tensor(value, ScalarType::Float) && value.toTensor().numel() == numel;
}

// The format of a weight by its dtype and that of its scales.
bool format_of(const et::EValue& weight, const et::EValue& scales, LinearFormat& format) {
  if (is_tensor(weight, ScalarType::Float)) {
    format = LinearFormat::kFloat32;
    return scales.isNone();
  }
  format = is_tensor(scales, ScalarType::BFloat16) ? LinearFormat::kInt4 : LinearFormat::kInt8;
  return is_tensor(weight, ScalarType::Char) &&
         (format == LinearFormat::kInt4 || is_tensor(scales, ScalarType::Float));
}

// What a run of several rows reads in the file would be let go behind it, and the next token would
// take a page fault for each page.
void keep_weights(const LinearWeights& weights, Stack stack, size_t first) {
  keep_mapped(weights.weights, stack[first]->toTensor().nbytes());
  if (weights.scales != nullptr) keep_mapped(weights.scales, stack[first + 1]->toTensor().nbytes());
  if (weights.offsets != nullptr) {
    keep_mapped(weights.offsets, stack[first + 3]->toTensor().nbytes());
  }
}

// Reads the weights from the arguments `first` and on: weight, scales, sums, offsets and their
// scales, then a bias and the features behind them.
bool read_weights(et::KernelRuntimeContext& context, Stack stack, size_t first, bool has_experts,
                  LinearWeights& weights) {
  const auto check = [&](bool is_right, const char* expected) {
    if (!is_right) {
      ET_LOG(Error, "doubleweave: expected %s", expected);
      context.fail(et::Error::InvalidArgument);
    }
    return is_right;
  };
  const et::EValue& scales = *stack[first + 1];
  const et::EValue& offsets = *stack[first + 3];
  const et::EValue& bias = *stack[first + 5];
  if (!check(stack[first + 6]->isInt() && stack[first + 7]->isInt(), "features are integers") ||
      !check(format_of(*stack[first], scales, weights.format),
             "weights are float32, int8 with float32 scales or int4 with bfloat16 scales")) {
    return false;
  }
  const Tensor& weight = stack[first]->toTensor();
  if (!check(weight.dim() >= 2, "weights are [experts, blocks, ...]")) return false;
  const bool is_int4 = weights.format == LinearFormat::kInt4;
  weights.num_experts = has_experts ? weight.size(0) : 1;
  weights.in_features = stack[first + 6]->toInt();
  weights.out_features = stack[first + 7]->toInt();
  const int64_t blocks =
      weights.num_experts * ((weights.out_features + kLinearBlock - 1) / kLinearBlock);
  if (!check(weights.in_features >= 1 && weights.out_features >= 1 &&
                 (!is_int4 || (weights.in_features % kLinearGroup == 0 &&
                               weights.in_features <= kMostInt4Features)),
             "input features are whole groups") ||
      !check(static_cast<int64_t>(weight.nbytes()) ==
                 blocks * linear_block_bytes(weights.format, weights.in_features),
             "weights have the features")) {
    return false;
  }
  weights.weights = weight.const_data_ptr();
  if (weights.format != LinearFormat::kFloat32) {
    const int64_t groups = is_int4 ? weights.in_features / kLinearGroup : 1;
    if (!check(scales.toTensor().numel() == blocks * groups * kLinearBlock,
               "each group has a scale") ||
        !check(is_floats(*stack[first + 2], blocks * kLinearBlock),
               "each output feature has a sum")) {
      return false;
    }
    weights.scales = scales.toTensor().const_data_ptr();
    weights.sums = stack[first + 2]->toTensor().const_data_ptr<float>();
  }
  if (!offsets.isNone()) {
    const int64_t bytes = blocks * linear_group_pairs(weights.in_features) * 2 * kLinearBlock;
    if (!check(is_int4 && is_tensor(offsets, ScalarType::Char) &&
                   offsets.toTensor().numel() == bytes &&
                   is_floats(*stack[first + 4], blocks * kLinearBlock),
               "each group of four bits has an offset, and each output feature their scale")) {
      return false;
    }
    weights.offsets = offsets.toTensor().const_data_ptr<int8_t>();
    weights.offset_scales = stack[first + 4]->toTensor().const_data_ptr<float>();
  }
  if (!bias.isNone()) {
    if (!check(is_floats(bias, weights.num_experts * weights.out_features),
               "each output feature has a bias")) {
      return false;
    }
    weights.bias = bias.toTensor().const_data_ptr<float>();
  }
  return true;
}

void expert_linear_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 11, "expert_linear_packed takes 11 arguments");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[0], ScalarType::Float) && is_tensor(*stack[10], ScalarType::Float),
      "x and out are float32 tensors");
  DOUBLEWEAVE_CHECK(context,
                    is_tensor(*stack[1], ScalarType::Long) && stack[1]->toTensor().dim() == 2,
                    "index is an int64 tensor [rows, choices]");
  const Tensor& x = stack[0]->toTensor();
  const Tensor& index = stack[1]->toTensor();
  Tensor& out = stack[10]->toTensor();
  LinearWeights weights{};
  if (!read_weights(context, stack, 2, true, weights)) return;
  ExpertRows rows{};
  rows.num_rows = index.size(0);
  rows.num_choices = index.size(1);
  rows.has_own_rows = x.dim() == 3;
  rows.x = x.const_data_ptr<float>();
  rows.index = index.const_data_ptr<int64_t>();
  DOUBLEWEAVE_CHECK(context,
                    (x.dim() == 2 || (x.dim() == 3 && x.size(1) == rows.num_choices)) &&
                        x.size(0) == rows.num_rows && x.size(x.dim() - 1) == weights.in_features,
                    "x is [rows, features] or [rows, choices, features]");
  DOUBLEWEAVE_CHECK(context, are_experts(rows, weights.num_experts),
                    "each choice is an expert that there is");
  DOUBLEWEAVE_CHECK(context, resize(out, {rows.num_rows, rows.num_choices, weights.out_features}),
                    "out has room for the result");
  if (rows.num_rows > 1) keep_weights(weights, stack, 2);
  expert_linear(weights, rows, out.mutable_data_ptr<float>());
}

void linear_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 10, "linear_packed takes 10 arguments");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[0], ScalarType::Float) && is_tensor(*stack[9], ScalarType::Float),
      "x and out are float32 tensors");
  const Tensor& x = stack[0]->toTensor();
  Tensor& out = stack[9]->toTensor();
  LinearWeights weights{};
  if (!read_weights(context, stack, 1, false, weights)) return;
  DOUBLEWEAVE_CHECK(context, x.dim() >= 1 && x.size(x.dim() - 1) == weights.in_features,
                    "x is [..., features]");
  std::array<int32_t, et::kTensorDimensionLimit> sizes{};
  std::copy(x.sizes().begin(), x.sizes().end(), sizes.begin());
  const auto rank = static_cast<size_t>(x.dim());
  sizes[rank - 1] = static_cast<int32_t>(weights.out_features);
  DOUBLEWEAVE_CHECK(context, et::resize_tensor(out, {sizes.data(), rank}) == et::Error::Ok,
                    "out has room for the result");
  const int64_t num_rows = x.numel() / weights.in_features;
  if (num_rows > 1) keep_weights(weights, stack, 1);
  linear(weights, x.const_data_ptr<float>(), num_rows, out.mutable_data_ptr<float>());
}

void sum_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 3, "expert_sum takes 3 arguments");
  DOUBLEWEAVE_CHECK(context,
                    is_tensor(*stack[0], ScalarType::Float) &&
                        is_tensor(*stack[1], ScalarType::Float) &&
                        is_tensor(*stack[2], ScalarType::Float),
                    "x, scores and out are float32 tensors");
  const Tensor& x = stack[0]->toTensor();
  const Tensor& scores = stack[1]->toTensor();
  Tensor& out = stack[2]->toTensor();
  DOUBLEWEAVE_CHECK(context,
                    x.dim() == 3 && scores.dim() == 2 && scores.size(0) == x.size(0) &&
                        scores.size(1) == x.size(1),
                    "x is [rows, choices, features] and scores are [rows, choices]");
  DOUBLEWEAVE_CHECK(context, resize(out, {x.size(0), x.size(2)}), "out has room for the result");
  expert_sum(x.const_data_ptr<float>(), scores.const_data_ptr<float>(),
             out.mutable_data_ptr<float>(), x.size(0), x.size(1), x.size(2));
}

}  // namespace

void register_linear_operators() {
  register_kernels({et::Kernel("doubleweave::expert_linear_packed.out", expert_linear_kernel),
                    et::Kernel("doubleweave::linear_packed.out", linear_kernel),
                    et::Kernel("doubleweave::expert_sum.out", sum_kernel)});
}

}  // namespace doubleweave

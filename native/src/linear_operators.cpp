// The schemas are those of src/doubleweave/compiler/graph/expert_ops.py and linear_ops.py:
//   doubleweave::expert_linear_packed.out(Tensor x, Tensor index, Tensor weight, Tensor? scales,
//       Tensor? sums, Tensor? offsets, Tensor? offset_scales, Tensor? bias, int in_features,
//       int out_features, *, Tensor(a!) out) -> Tensor(a!)
//   doubleweave::linear_packed.out, the same without index
//   doubleweave::expert_sum.out(Tensor x, Tensor scores, *, Tensor(a!) out) -> Tensor(a!)
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
// scales, then a bias and the features behind them. Fails the context where they are no weights.
void read_weights(et::KernelRuntimeContext& context, Stack stack, size_t first, bool has_experts,
                  LinearWeights& weights) {
  const et::EValue& scales = *stack[first + 1];
  const et::EValue& offsets = *stack[first + 3];
  const et::EValue& bias = *stack[first + 5];
  DOUBLEWEAVE_CHECK(context, stack[first + 6]->isInt() && stack[first + 7]->isInt(),
                    "features are integers");
  DOUBLEWEAVE_CHECK(context, format_of(*stack[first], scales, weights.format),
                    "weights are float32, int8 with float32 scales or int4 with bfloat16 scales");
  const Tensor& weight = stack[first]->toTensor();
  DOUBLEWEAVE_CHECK(context, weight.dim() >= 2, "weights are [experts, blocks, ...]");
  const bool is_int4 = weights.format == LinearFormat::kInt4;
  weights.num_experts = has_experts ? weight.size(0) : 1;
  weights.in_features = stack[first + 6]->toInt();
  weights.out_features = stack[first + 7]->toInt();
  const int64_t blocks =
      weights.num_experts * ((weights.out_features + kLinearBlock - 1) / kLinearBlock);
  DOUBLEWEAVE_CHECK(context,
                    weights.in_features >= 1 && weights.out_features >= 1 &&
                        (!is_int4 || (weights.in_features % kLinearGroup == 0 &&
                                      weights.in_features <= kMostInt4Features)),
                    "input features are whole groups");
  DOUBLEWEAVE_CHECK(context,
                    static_cast<int64_t>(weight.nbytes()) ==
                        blocks * linear_block_bytes(weights.format, weights.in_features),
                    "weights have the features");
  weights.weights = weight.const_data_ptr();
  if (weights.format != LinearFormat::kFloat32) {
    const int64_t groups = is_int4 ? weights.in_features / kLinearGroup : 1;
    DOUBLEWEAVE_CHECK(context, scales.toTensor().numel() == blocks * groups * kLinearBlock,
                      "each group has a scale");
    DOUBLEWEAVE_CHECK(context, is_floats(*stack[first + 2], blocks * kLinearBlock),
                      "each output feature has a sum");
    weights.scales = scales.toTensor().const_data_ptr();
    weights.sums = stack[first + 2]->toTensor().const_data_ptr<float>();
  }
  if (!offsets.isNone()) {
    const int64_t bytes = blocks * linear_group_pairs(weights.in_features) * 2 * kLinearBlock;
    DOUBLEWEAVE_CHECK(context,
                      is_int4 && is_tensor(offsets, ScalarType::Char) &&
                          offsets.toTensor().numel() == bytes &&
                          is_floats(*stack[first + 4], blocks * kLinearBlock),
                      "each group of four bits has an offset, and each output feature their scale");
    weights.offsets = offsets.toTensor().const_data_ptr<int8_t>();
    weights.offset_scales = stack[first + 4]->toTensor().const_data_ptr<float>();
  }
  if (!bias.isNone()) {
    DOUBLEWEAVE_CHECK(context, is_floats(bias, weights.num_experts * weights.out_features),
                      "each output feature has a bias");
    weights.bias = bias.toTensor().const_data_ptr<float>();
  }
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
  read_weights(context, stack, 2, true, weights);
  if (context.failure_state() != et::Error::Ok) return;
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
  read_weights(context, stack, 1, false, weights);
  if (context.failure_state() != et::Error::Ok) return;
  DOUBLEWEAVE_CHECK(context, x.dim() >= 1 && x.size(x.dim() - 1) == weights.in_features,
                    "x is [..., features]");
  const auto leading = static_cast<size_t>(x.dim()) - 1;
  DOUBLEWEAVE_CHECK(context, resize_to_rows(out, {x.sizes().data(), leading}, weights.out_features),
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

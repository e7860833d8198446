// The schemas are those of src/doubleweave/compiler/graph/expert_ops.py:
//   doubleweave::expert_linear_packed.out(Tensor x, Tensor index, Tensor weight, Tensor? scales,
//       Tensor? sums, Tensor? bias, int in_features, int out_features, *, Tensor(a!) out)
//       -> Tensor(a!)
//   doubleweave::expert_sum.out(Tensor x, Tensor scores, *, Tensor(a!) out) -> Tensor(a!)
#include "doubleweave/experts.h"
#include "kernel_helpers.h"
#include "operators.h"

namespace doubleweave {
namespace {

bool is_floats(const et::EValue& value, int64_t numel) {
  return is_tensor(value, ScalarType::Float) && value.toTensor().numel() == numel;
}

// The format of a weight by its dtype and that of its scales.
bool format_of(const et::EValue& weight, const et::EValue& scales, ExpertFormat& format) {
  if (is_tensor(weight, ScalarType::Float)) {
    format = ExpertFormat::kFloat32;
    return scales.isNone();
  }
  format = is_tensor(scales, ScalarType::BFloat16) ? ExpertFormat::kInt4 : ExpertFormat::kInt8;
  return is_tensor(weight, ScalarType::Char) &&
         (format == ExpertFormat::kInt4 || is_tensor(scales, ScalarType::Float));
}

void linear_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 9, "expert_linear_packed takes 9 arguments");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[0], ScalarType::Float) && is_tensor(*stack[8], ScalarType::Float),
      "x and out are float32 tensors");
  DOUBLEWEAVE_CHECK(context,
                    is_tensor(*stack[1], ScalarType::Long) && stack[1]->toTensor().dim() == 2,
                    "index is an int64 tensor [rows, choices]");
  DOUBLEWEAVE_CHECK(context, stack[6]->isInt() && stack[7]->isInt(), "features are integers");
  const Tensor& x = stack[0]->toTensor();
  const Tensor& index = stack[1]->toTensor();
  Tensor& out = stack[8]->toTensor();
  ExpertWeights weights{};
  DOUBLEWEAVE_CHECK(context, format_of(*stack[2], *stack[3], weights.format),
                    "weights are float32, int8 with float32 scales or int4 with bfloat16 scales");
  const Tensor& weight = stack[2]->toTensor();
  DOUBLEWEAVE_CHECK(context, weight.dim() >= 2, "weights are [experts, blocks, ...]");
  weights.num_experts = weight.size(0);
  weights.in_features = stack[6]->toInt();
  weights.out_features = stack[7]->toInt();
  DOUBLEWEAVE_CHECK(
      context,
      weights.in_features >= 1 && weights.out_features >= 1 &&
          (weights.format != ExpertFormat::kInt4 || weights.in_features % kExpertGroup == 0),
      "input features are whole groups");
  const int64_t blocks =
      weights.num_experts * ((weights.out_features + kExpertBlock - 1) / kExpertBlock);
  const int64_t block_bytes = expert_block_bytes(weights.format, weights.in_features);
  DOUBLEWEAVE_CHECK(context, static_cast<int64_t>(weight.nbytes()) == blocks * block_bytes,
                    "weights have the features");
  weights.weights = weight.const_data_ptr();
  if (weights.format != ExpertFormat::kFloat32) {
    const int64_t groups =
        weights.format == ExpertFormat::kInt4 ? weights.in_features / kExpertGroup : 1;
    DOUBLEWEAVE_CHECK(context, stack[3]->toTensor().numel() == blocks * groups * kExpertBlock,
                      "each group has a scale");
    DOUBLEWEAVE_CHECK(context, is_floats(*stack[4], blocks * kExpertBlock),
                      "each output feature has a sum");
    weights.scales = stack[3]->toTensor().const_data_ptr();
    weights.sums = stack[4]->toTensor().const_data_ptr<float>();
  }
  if (!stack[5]->isNone()) {
    DOUBLEWEAVE_CHECK(context, is_floats(*stack[5], weights.num_experts * weights.out_features),
                      "each output feature has a bias");
    weights.bias = stack[5]->toTensor().const_data_ptr<float>();
  }
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
  expert_linear(weights, rows, out.mutable_data_ptr<float>());
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

void register_expert_operators() {
  register_kernels({et::Kernel("doubleweave::expert_linear_packed.out", linear_kernel),
                    et::Kernel("doubleweave::expert_sum.out", sum_kernel)});
}

}  // namespace doubleweave

// The schemas are those of src/doubleweave/compiler/graph/expert_ops.py, linear_ops.py and
// table_ops.py:
//   doubleweave::pack_rows.out(Tensor x, Tensor? other, int kind, float epsilon, *, Tensor(a!) out)
//       -> Tensor(a!)
//   doubleweave::linear_packed.out(Tensor rows, Tensor weight, Tensor? scales, Tensor? offsets,
//       Tensor? offset_scales, Tensor? bias, int in_features, int out_features, *, Tensor(a!) out)
//       -> Tensor(a!)
//   doubleweave::expert_linear_packed.out(Tensor x, Tensor index, …), the same behind them
//   doubleweave::expert_sum.out(Tensor x, Tensor scores, *, Tensor(a!) out) -> Tensor(a!)
//   doubleweave::table_rows_packed.out(Tensor index, …), as of linear_packed
#include "doubleweave/linears.h"
#include "file_loader.h"
#include "kernel_helpers.h"
#include "operators.h"

namespace doubleweave {
namespace {

bool is_floats(const et::EValue& value, int64_t numel) {
  return is_tensor(value, ScalarType::Float) && value.toTensor().numel() == numel;
}

// The format of a weight, by its dtype and how many bytes it has for so many blocks.
bool format_of(const et::EValue& weight, const et::EValue& scales, int64_t blocks,
               LinearWeights& weights) {
  for (const LinearFormat format :
       {LinearFormat::kFloat32, LinearFormat::kInt8, LinearFormat::kInt4}) {
    const bool is_float = format == LinearFormat::kFloat32;
    weights.format = format;
    if (is_tensor(weight, is_float ? ScalarType::Float : ScalarType::Char) &&
        static_cast<int64_t>(weight.toTensor().nbytes()) ==
            blocks * linear_block_bytes(format, weights.in_features)) {
      return is_float ? scales.isNone() : is_tensor(scales, ScalarType::BFloat16);
    }
  }
  return false;
}

// What a run of several rows reads in the file would be let go behind it, and the next token would
// take a page fault for each page.
void keep_weights(const LinearWeights& weights, Stack stack, size_t first) {
  keep_mapped(weights.weights, stack[first]->toTensor().nbytes());
  if (weights.scales != nullptr) keep_mapped(weights.scales, stack[first + 1]->toTensor().nbytes());
  if (weights.offsets != nullptr) {
    keep_mapped(weights.offsets, stack[first + 2]->toTensor().nbytes());
  }
}

// Reads the weights from the arguments `first` and on: weight, scales, offsets and their scales,
// then a bias and the features behind them. Fails the context where they are no weights.
void read_weights(et::KernelRuntimeContext& context, Stack stack, size_t first, bool has_experts,
                  LinearWeights& weights) {
  const et::EValue& scales = *stack[first + 1];
  const et::EValue& offsets = *stack[first + 2];
  const et::EValue& bias = *stack[first + 4];
  DOUBLEWEAVE_CHECK(context, stack[first + 5]->isInt() && stack[first + 6]->isInt(),
                    "features are integers");
  DOUBLEWEAVE_CHECK(context, stack[first]->isTensor() && stack[first]->toTensor().dim() >= 2,
                    "weights are [experts, blocks, ...]");
  const Tensor& weight = stack[first]->toTensor();
  weights.num_experts = has_experts ? weight.size(0) : 1;
  weights.in_features = stack[first + 5]->toInt();
  weights.out_features = stack[first + 6]->toInt();
  DOUBLEWEAVE_CHECK(context, weights.in_features >= 1 && weights.out_features >= 1,
                    "there are features");
  const int64_t blocks =
      weights.num_experts * ((weights.out_features + kLinearBlock - 1) / kLinearBlock);
  DOUBLEWEAVE_CHECK(
      context, format_of(*stack[first], scales, blocks, weights),
      "weights are float32, or int8 or int4 with bfloat16 scales, and have the features");
  const bool is_int4 = weights.format == LinearFormat::kInt4;
  DOUBLEWEAVE_CHECK(context,
                    !is_int4 || (weights.in_features % kLinearGroup == 0 &&
                                 weights.in_features <= kMostInt4Features),
                    "input features are whole groups");
  weights.weights = weight.const_data_ptr();
  if (weights.format != LinearFormat::kFloat32) {
    const int64_t group = linear_scale_group(weights.format);
    const int64_t groups = (weights.in_features + group - 1) / group;
    DOUBLEWEAVE_CHECK(context, scales.toTensor().numel() == blocks * groups * kLinearBlock,
                      "each group has a scale");
    weights.scales = scales.toTensor().const_data_ptr();
  }
  if (!offsets.isNone()) {
    const int64_t bytes = blocks * linear_group_pairs(weights.in_features) * 2 * kLinearBlock;
    DOUBLEWEAVE_CHECK(context,
                      is_int4 && is_tensor(offsets, ScalarType::Char) &&
                          offsets.toTensor().numel() == bytes &&
                          is_floats(*stack[first + 3], blocks * kLinearBlock),
                      "each group of four bits has an offset, and each output feature their scale");
    weights.offsets = offsets.toTensor().const_data_ptr<int8_t>();
    weights.offset_scales = stack[first + 3]->toTensor().const_data_ptr<float>();
  }
  if (!bias.isNone()) {
    DOUBLEWEAVE_CHECK(context, is_floats(bias, weights.num_experts * weights.out_features),
                      "each output feature has a bias");
    weights.bias = bias.toTensor().const_data_ptr<float>();
  }
}

void pack_rows_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 5, "pack_rows takes 5 arguments");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[0], ScalarType::Float) && is_tensor(*stack[4], ScalarType::Char),
      "x is a float32 tensor, out an int8 one");
  DOUBLEWEAVE_CHECK(context, stack[2]->isInt() && stack[3]->isDouble(),
                    "the kind is an integer, epsilon a number");
  const Tensor& x = stack[0]->toTensor();
  Tensor& out = stack[4]->toTensor();
  DOUBLEWEAVE_CHECK(context, x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x is [..., features]");
  const int64_t in_features = x.size(x.dim() - 1);
  RowSource source{};
  source.kind = static_cast<RowKind>(stack[2]->toInt());
  source.x = x.const_data_ptr<float>();
  source.epsilon = static_cast<float>(stack[3]->toDouble());
  const bool is_plain = source.kind == RowKind::kPlain;
  DOUBLEWEAVE_CHECK(context, RowKind::kPlain <= source.kind && source.kind <= RowKind::kNormed,
                    "rows are of a kind that there is");
  DOUBLEWEAVE_CHECK(
      context,
      is_plain ? stack[1]->isNone()
               : is_floats(*stack[1], source.kind == RowKind::kNormed ? in_features : x.numel()),
      "the other has a number for each of x, or of a row");
  if (!is_plain) source.other = stack[1]->toTensor().const_data_ptr<float>();
  const auto leading = static_cast<size_t>(x.dim()) - 1;
  DOUBLEWEAVE_CHECK(context,
                    resize_to_rows(out, {x.sizes().data(), leading}, linear_row_bytes(in_features)),
                    "out has room for the result");
  pack_rows(source, x.numel() / in_features, in_features,
            reinterpret_cast<uint8_t*>(out.mutable_data_ptr<int8_t>()));
}

void expert_linear_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 10, "expert_linear_packed takes 10 arguments");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[0], ScalarType::Float) && is_tensor(*stack[9], ScalarType::Float),
      "x and out are float32 tensors");
  DOUBLEWEAVE_CHECK(context,
                    is_tensor(*stack[1], ScalarType::Long) && stack[1]->toTensor().dim() == 2,
                    "index is an int64 tensor [rows, choices]");
  const Tensor& x = stack[0]->toTensor();
  const Tensor& index = stack[1]->toTensor();
  Tensor& out = stack[9]->toTensor();
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
  DOUBLEWEAVE_CHECK(context, stack.size() >= 9, "linear_packed takes 9 arguments");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[0], ScalarType::Char) && is_tensor(*stack[8], ScalarType::Float),
      "rows are packed, out is a float32 tensor");
  const Tensor& rows = stack[0]->toTensor();
  Tensor& out = stack[8]->toTensor();
  LinearWeights weights{};
  read_weights(context, stack, 1, false, weights);
  if (context.failure_state() != et::Error::Ok) return;
  const int64_t row_bytes = linear_row_bytes(weights.in_features);
  DOUBLEWEAVE_CHECK(context,
                    weights.format != LinearFormat::kFloat32 && rows.dim() >= 1 &&
                        rows.size(rows.dim() - 1) == row_bytes,
                    "rows are those of the weights' features");
  const auto leading = static_cast<size_t>(rows.dim()) - 1;
  DOUBLEWEAVE_CHECK(context,
                    resize_to_rows(out, {rows.sizes().data(), leading}, weights.out_features),
                    "out has room for the result");
  const int64_t num_rows = rows.numel() / row_bytes;
  if (num_rows > 1) keep_weights(weights, stack, 1);
  linear(weights, reinterpret_cast<const uint8_t*>(rows.const_data_ptr<int8_t>()), num_rows,
         out.mutable_data_ptr<float>());
}

void table_kernel(et::KernelRuntimeContext& context, Stack stack) {
  DOUBLEWEAVE_CHECK(context, stack.size() >= 9, "table_rows_packed takes 9 arguments");
  DOUBLEWEAVE_CHECK(
      context, is_tensor(*stack[0], ScalarType::Long) && is_tensor(*stack[8], ScalarType::Float),
      "index is int64, out is float32");
  LinearWeights weights{};
  read_weights(context, stack, 1, false, weights);
  if (context.failure_state() != et::Error::Ok) return;
  const Tensor& index = stack[0]->toTensor();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  const int64_t count = index.numel();
  DOUBLEWEAVE_CHECK(context, weights.format != LinearFormat::kFloat32, "the table is of few bits");
  DOUBLEWEAVE_CHECK(context, are_rows(index, weights.out_features), "the table has each row");
  Tensor& out = stack[8]->toTensor();
  DOUBLEWEAVE_CHECK(
      context,
      resize_to_rows(out, {index.sizes().data(), index.sizes().size()}, weights.in_features),
      "out has room for the result");
  float* result = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    read_linear_row(weights, rows[i], result + i * weights.in_features);
  }
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
                    et::Kernel("doubleweave::pack_rows.out", pack_rows_kernel),
                    et::Kernel("doubleweave::table_rows_packed.out", table_kernel),
                    et::Kernel("doubleweave::expert_sum.out", sum_kernel)});
}

}  // namespace doubleweave

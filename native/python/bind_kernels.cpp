// The kernels called directly, for tests and benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "array.h"
#include "bindings.h"
#include "doubleweave/attention.h"
#include "doubleweave/error.h"
#include "doubleweave/rotary.h"
#include "doubleweave/threads.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// A float32 array as rows and columns; leading dimensions fold into the rows.
struct Matrix {
  Matrix(nb::handle object, bool is_writable, const std::string& what)
      : array(object, is_writable, what) {
    array.require_dtype(DType::kFloat32, what);
    columns = array.sizes().empty() ? 1 : array.sizes().back();
    rows = columns == 0 ? 0 : static_cast<int64_t>(array.nbytes() / sizeof(float)) / columns;
  }
  float* data() const { return static_cast<float*>(array.data()); }

  Array array;
  int64_t rows;
  int64_t columns;
};

void run_attention(ArrayObject q_object, ArrayObject k_object, ArrayObject v_object,
                   ArrayObject out_object, int64_t num_heads, int64_t num_kv_heads, float scale,
                   int64_t window, float soft_cap, bool causal, int num_threads, int64_t block,
                   const nb::object& sinks_object, const nb::object& slopes_object) {
  const Matrix q(q_object, false, "q");
  const Matrix k(k_object, false, "k");
  const Matrix v(v_object, false, "v");
  const Matrix out(out_object, true, "out");
  require(num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
          "num_kv_heads must divide num_heads.");
  require(q.columns % num_heads == 0 && k.columns * num_heads == q.columns * num_kv_heads &&
              v.columns % num_kv_heads == 0 && out.columns * num_kv_heads == v.columns * num_heads,
          "the columns of q, k, v and out must be heads times head sizes.");
  require(q.columns > 0 && v.columns > 0, "heads must not be empty.");
  require(q.rows >= 1 && k.rows >= q.rows && v.rows == k.rows && out.rows == q.rows,
          "k and v must have the same rows, at least as many as q, and out as many as q.");
  require(window >= 0 && soft_cap >= 0 && block >= 0,
          "window, soft_cap and block must not be negative.");
  std::optional<Matrix> sinks;
  std::optional<Matrix> slopes;
  if (!sinks_object.is_none()) sinks.emplace(sinks_object, false, "sinks");
  if (!slopes_object.is_none()) slopes.emplace(slopes_object, false, "slopes");
  for (const std::optional<Matrix>* found : {&sinks, &slopes}) {
    require(!*found || ((*found)->rows == 1 && (*found)->columns == num_heads),
            "sinks and slopes must have a number for each query head.");
  }
  const AttentionParams params{.num_queries = q.rows,
                               .num_keys = k.rows,
                               .num_heads = num_heads,
                               .num_kv_heads = num_kv_heads,
                               .head_dim = q.columns / num_heads,
                               .value_dim = v.columns / num_kv_heads,
                               .scale = scale,
                               .window = window,
                               .soft_cap = soft_cap,
                               .causal = causal,
                               .block = block,
                               .sinks = sinks ? sinks->data() : nullptr,
                               .slopes = slopes ? slopes->data() : nullptr};
  const nb::gil_scoped_release release;
  if (num_threads == 1) {
    attention(params, q.data(), k.data(), v.data(), out.data());
    return;
  }
  const IntraOpScope scope(num_threads);
  attention(params, q.data(), k.data(), v.data(), out.data(), parallel_items);
}

void run_rotary(ArrayObject x_object, ArrayObject cos_object, ArrayObject sin_object,
                ArrayObject out_object, int64_t num_heads) {
  const Matrix x(x_object, false, "x");
  const Matrix cos(cos_object, false, "cos");
  const Matrix sin(sin_object, false, "sin");
  const Matrix out(out_object, true, "out");
  require(num_heads >= 1 && x.columns % num_heads == 0, "num_heads must divide the columns of x.");
  require(cos.rows == x.rows && sin.rows == x.rows && sin.columns == cos.columns,
          "cos and sin must have a row for each row of x.");
  require(cos.columns % 2 == 0 && cos.columns <= x.columns / num_heads,
          "an even part of each head can turn.");
  require(out.rows == x.rows && out.columns == x.columns, "out must have the shape of x.");
  rotary(x.data(), cos.data(), sin.data(), out.data(), x.rows, num_heads, x.columns / num_heads,
         cos.columns);
}

bool choose_attention_isa(const std::string& name) {
  std::string known;
  for (const Isa isa : kIsas) {
    if (name == isa_name(isa)) {
      return set_attention_isa(isa);
    }
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw nb::value_error(
      ("there is no instruction set '" + name + "'; use one of " + known + ".").c_str());
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("attention", &run_attention, "q"_a, "k"_a, "v"_a, "out"_a, nb::kw_only(), "num_heads"_a,
        "num_kv_heads"_a, "scale"_a, "window"_a = 0, "soft_cap"_a = 0.0f, "causal"_a = true,
        "num_threads"_a = 1, "block"_a = 0, "sinks"_a = nb::none(), "slopes"_a = nb::none(),
        "Attention of q [T, H*D] over k [S, K*D] and v [S, K*Dv], float32, into out [T, H*Dv].\n\n"
        "sinks and slopes are float32 [H] or None.");
  m.def("rotary", &run_rotary, "x"_a, "cos"_a, "sin"_a, "out"_a, nb::kw_only(), "num_heads"_a,
        "Rotary embedding of x [T, H*D] by cos and sin [T, R], float32, into out [T, H*D].");
  m.def("attention_isa", [] { return std::string(isa_name(attention_isa())); });
  m.def("set_attention_isa", &choose_attention_isa, "name"_a,
        "Choose the instruction set of attention; False if this machine or build lacks it.");
}

}  // namespace doubleweave::python

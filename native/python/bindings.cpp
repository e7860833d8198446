// The Python module `doubleweave._native`: a thin layer over the library. Everything that runs a
// method releases the GIL. Imports neither torch nor NumPy (NumPy when the first array is given
// out).
#include "bindings.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <deque>

#include "array.h"
#include "doubleweave/crash.h"
#include "doubleweave/error.h"
#include "doubleweave/program.h"
#include "doubleweave/threads.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Arrays = nb::typed<nb::sequence, ArrayObject>;
using Sizes = nb::typed<nb::tuple, int32_t, nb::ellipsis>;

Sizes to_tuple(std::span<const int32_t> sizes) {
  return Sizes(nb::tuple(nb::cast(std::vector(sizes.begin(), sizes.end()))));
}

// Arrays of one side of a call, checked against what the method expects.
std::deque<Array> arrays_of(Arrays objects, const std::vector<TensorInfo>& infos, bool are_outputs,
                            const std::string& method) {
  std::deque<Array> arrays;  // which never moves one: each holds a view that Python fills in place
  size_t i = 0;
  for (nb::handle object : objects) {
    const std::string what =
        "method '" + method + "': " + (are_outputs ? "output " : "input ") + std::to_string(i);
    arrays.emplace_back(object, are_outputs, what);
    if (i < infos.size()) {
      arrays.back().require_dtype(infos[i].dtype, what);
    }
    ++i;
  }
  return arrays;
}

std::vector<Sizes> run_instance(Instance& instance, Arrays inputs, Arrays outputs, int threads) {
  const std::deque<Array> in = arrays_of(inputs, instance.inputs(), false, instance.method());
  const std::deque<Array> out = arrays_of(outputs, instance.outputs(), true, instance.method());
  std::vector<InputBinding> in_bindings;
  for (const Array& array : in) {
    in_bindings.push_back({array.data(), array.sizes()});
  }
  std::vector<OutputBinding> out_bindings;
  for (const Array& array : out) {
    out_bindings.push_back({array.data(), array.nbytes(), array.sizes()});
  }
  {
    const nb::gil_scoped_release release;
    instance.run(in_bindings, out_bindings, threads);
  }
  std::vector<Sizes> result;
  for (size_t i = 0; i < out.size(); ++i) {
    result.push_back(to_tuple(instance.output_sizes(i)));
  }
  return result;
}

std::string info_repr(const TensorInfo& info) {
  return text("TensorInfo(", dtype_name(info.dtype), ", ", SizesText{info.sizes},
              info.is_dynamic ? ", dynamic" : "", ")");
}

void bind_programs(nb::module_& m) {
  nb::class_<TensorInfo>(m, "TensorInfo",
                         "What a method expects of an input or gives as an output.")
      .def_prop_ro("dtype", [](const TensorInfo& info) { return dtype_name(info.dtype); })
      .def_prop_ro(
          "sizes", [](const TensorInfo& info) { return to_tuple(info.sizes); },
          "The sizes, or their upper bounds when `is_dynamic`.")
      .def_ro("is_dynamic", &TensorInfo::is_dynamic)
      .def_ro("nbytes", &TensorInfo::nbytes, "Bytes at the upper bound.")
      .def("__repr__", &info_repr);

  nb::class_<Instance>(m, "Instance",
                       "A loaded method with its own memory; one thread at a time uses it.")
      .def_prop_ro("method", &Instance::method)
      .def_prop_ro("inputs", &Instance::inputs, nb::rv_policy::copy)
      .def_prop_ro("outputs", &Instance::outputs, nb::rv_policy::copy)
      .def(
          "bind_input",
          [](Instance& self, size_t index, uintptr_t address, const std::vector<int32_t>& sizes) {
            self.bind_input(index, reinterpret_cast<const void*>(address), sizes);
          },
          "index"_a, "address"_a, "sizes"_a,
          "Read an input from an address; the caller keeps the memory alive.")
      .def(
          "bind_output",
          [](Instance& self, size_t index, uintptr_t address, size_t capacity_bytes,
             const std::vector<int32_t>& sizes) {
            self.bind_output(index, reinterpret_cast<void*>(address), capacity_bytes, sizes);
          },
          "index"_a, "address"_a, "capacity_bytes"_a, "sizes"_a = std::vector<int32_t>(),
          "Write an output to an address; without sizes the capacity must hold the upper bound.")
      .def("execute", &Instance::execute, nb::call_guard<nb::gil_scoped_release>(),
           "Run what is bound, without the GIL.")
      .def(
          "output_sizes",
          [](const Instance& self, size_t index) { return to_tuple(self.output_sizes(index)); },
          "index"_a)
      .def("run", &run_instance, "inputs"_a, "outputs"_a, "threads"_a = 0,
           "Run on C-contiguous arrays without a copy; output shapes must be exact. Returns their "
           "sizes.\n\n`threads` sets the number of intra-operator threads; 0 keeps what is set.");

  nb::class_<Program>(m, "Program", "An ExecuTorch program file, mapped into memory.")
      .def(nb::init<const std::string&>(), "path"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("path", &Program::path)
      .def("trim", &Program::trim, "Let go of the file's pages; used ones come back on demand.")
      .def_prop_ro("method_names", &Program::method_names, nb::rv_policy::copy)
      .def(
          "load",
          [](const Program& self, const std::string& method, int workspace_group) {
            return std::shared_ptr<Instance>(self.load(method, workspace_group));
          },
          "method"_a, "workspace_group"_a = -1, nb::call_guard<nb::gil_scoped_release>(),
          "Load a method, without the GIL. Instances of one workspace group (not -1) share scratch "
          "memory.");
}

void bind_threads(nb::module_& m) {
  m.def("max_threads", &max_threads);
  m.def("pool_threads", &pool_threads);
  m.def("set_pool_threads", &set_pool_threads, "num_threads"_a,
        nb::call_guard<nb::gil_scoped_release>(),
        "Give the pool this many threads; methods that are loaded keep it as it is.");
  m.def("intra_op_threads", &intra_op_threads);
  m.def("set_intra_op_threads", &set_intra_op_threads, "num_threads"_a,
        nb::call_guard<nb::gil_scoped_release>(),
        "Wait until nothing runs, then let operators use this many threads.");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Doubleweave's native run time: programs, instances, caches, executions and kernels.";
  // Objects that outlive the interpreter are the caller's choice, not worth a page on stderr.
  nb::set_leak_warnings(false);
  nb::exception<Error>(m, "Error", PyExc_RuntimeError).attr("__doc__") =
      "A wrong argument, a damaged program, or a method that failed.";
  bind_programs(m);
  bind_threads(m);
  bind_memory(m);
  bind_execution(m);
  bind_kernels(m);
  bind_turns(m);
  bind_packed(m);
  m.def("say_crashes", &say_crashes, "exit_code"_a,
        "From now on a crash writes one sentence to standard error and ends the process with this "
        "code.");
}

}  // namespace doubleweave::python

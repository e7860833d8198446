#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "doubleweave/packed_weights.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;

void bind_packed(nb::module_& m) {
  nb::class_<PackedWeights>(m, "PackedWeights",
                            "A program's weights as XNNPACK packs them, in files that are mapped.")
      .def(nb::init<>(), "Keeps none.")
      .def(nb::init<const std::string&, const std::string&, const std::string&, uint64_t>(),
           "cache"_a, "sha256"_a, "name"_a, "weight_bytes"_a,
           "Those of a program in a cache folder; none where they are few, or the disk is full.")
      .def_prop_ro("keeps_any", &PackedWeights::keeps_any)
      .def(
          "load",
          [](const PackedWeights& self, const Program& program, const std::string& method,
             int workspace_group, uint64_t weight_bytes) {
            return std::shared_ptr<Instance>(
                self.load(program, method, workspace_group, weight_bytes));
          },
          "program"_a, "method"_a, "workspace_group"_a, "weight_bytes"_a,
          nb::call_guard<nb::gil_scoped_release>(),
          "Load a method as Program.load does: its packed weights are mapped, or written first.");

  nb::class_<KeptWeights>(m, "KeptWeights", "The packed weights of a program in a cache folder.")
      .def_prop_ro(
          "name",
          [](const KeptWeights& self) {
            return nb::steal<nb::str>(PyUnicode_DecodeUTF8(
                self.name.data(), static_cast<Py_ssize_t>(self.name.size()), "replace"));
          },
          "What people know the program by.")
      .def_ro("num_bytes", &KeptWeights::bytes)
      .def_ro("used", &KeptWeights::used, "When they were used last, in seconds since 1970.")
      .def_prop_ro("folder", [](const KeptWeights& self) { return self.folder.string(); });
  m.def(
      "kept_weights", [](const std::string& cache) { return kept_weights(cache); }, "cache"_a,
      "What a cache folder has, the longest unused first.");
  m.def(
      "remove_kept_weights",
      [](const std::string& cache, uint64_t most_bytes) {
        return remove_kept_weights(cache, most_bytes);
      },
      "cache"_a, "most_bytes"_a,
      "Remove what was not used for longest, until so many bytes are left; the bytes removed.");
  m.attr("MOST_KEPT_BYTES") = PackedWeights::kMostBytes;
}

}  // namespace doubleweave::python

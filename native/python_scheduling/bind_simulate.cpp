// The Python module `doubleweave._scheduling`: predicting needs it alone, without ExecuTorch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <span>
#include <vector>

#include "doubleweave/simulate.h"

namespace doubleweave::python {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), array.size()};
}

// Hands a vector's memory to NumPy.
nb::object to_numpy(std::vector<int64_t> values) {
  auto* const owned = new std::vector<int64_t>(std::move(values));
  const nb::capsule owner(
      owned, [](void* pointer) noexcept { delete static_cast<std::vector<int64_t>*>(pointer); });
  return nb::cast(
      nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>(owned->data(), {owned->size()}, owner),
      nb::rv_policy::reference);
}

}  // namespace

NB_MODULE(_scheduling, m) {
  m.doc() = "When tasks would run, and greedy schedules; see doubleweave/simulate.h.";
  m.def(
      "simulate",
      [](const Array<int64_t>& duration_ns, const Array<int32_t>& after_starts,
         const Array<int32_t>& after, const std::vector<std::vector<int32_t>>& workers,
         const Array<int64_t>& hand_over_ns, const Array<int32_t>& kind,
         const Array<double>& contention) {
        Times times =
            simulate({span_of(duration_ns), span_of(after_starts), span_of(after)}, workers,
                     span_of(hand_over_ns), {span_of(kind), span_of(contention)});
        return nb::make_tuple(to_numpy(std::move(times.start_ns)),
                              to_numpy(std::move(times.end_ns)));
      },
      "duration_ns"_a, "after_starts"_a, "after"_a, "workers"_a, "hand_over_ns"_a, "kind"_a,
      "contention"_a);
  m.def(
      "list_schedule",
      [](const Array<int64_t>& duration_ns, const Array<int32_t>& after_starts,
         const Array<int32_t>& after, const Array<int32_t>& device,
         const Array<int32_t>& worker_device, const Array<int64_t>& priority,
         const Array<int32_t>& home, const Array<int64_t>& hand_over_ns) {
        return list_schedule(
            {span_of(duration_ns), span_of(after_starts), span_of(after)},
            {span_of(device), span_of(worker_device), span_of(priority), span_of(home)},
            span_of(hand_over_ns));
      },
      "duration_ns"_a, "after_starts"_a, "after"_a, "device"_a, "worker_device"_a, "priority"_a,
      "home"_a, "hand_over_ns"_a);
  m.def(
      "path_to_end",
      [](const Array<int64_t>& duration_ns, const Array<int32_t>& after_starts,
         const Array<int32_t>& after) {
        return to_numpy(path_to_end({span_of(duration_ns), span_of(after_starts), span_of(after)}));
      },
      "duration_ns"_a, "after_starts"_a, "after"_a);
}

}  // namespace doubleweave::python

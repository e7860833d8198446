// NumPy arrays as spans and from vectors, and the parts of the module `_scheduling`.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace doubleweave::python {

template <typename T>
using Array =
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

template <typename T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), array.size()};
}

template <typename T>
std::vector<T> vector_of(const Array<T>& array) {
  return {array.data(), array.data() + array.size()};
}

// Hands a vector's memory to NumPy.
template <typename T>
nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>> to_numpy(std::vector<T> values) {
  auto* const owned = new std::vector<T>(std::move(values));
  const nanobind::capsule owner(
      owned, [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
  return {owned->data(), {owned->size()}, owner};
}

void bind_graph(nanobind::module_& m);
void bind_planner(nanobind::module_& m);

}  // namespace doubleweave::python

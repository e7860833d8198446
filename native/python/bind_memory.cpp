#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "array.h"
#include "bindings.h"
#include "doubleweave/buffers.h"
#include "doubleweave/cache_format.h"
#include "doubleweave/error.h"
#include "doubleweave/kv_cache.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

nb::ndarray<nb::numpy> cache_view(nb::handle_t<KvCache> self, size_t entry, int64_t num_rows,
                                  const std::string& dtype_text) {
  const auto& cache = nb::cast<const KvCache&>(self);
  const DType dtype = dtype_from_name(dtype_text);
  const size_t row_bytes = cache.row_bytes(entry);
  require(
      num_rows >= 0 && static_cast<size_t>(num_rows) <= cache.capacity_bytes(entry) / row_bytes &&
          row_bytes % dtype_bytes(dtype) == 0,
      "a view of ", num_rows, " rows of ", dtype_text, " does not fit entry ", entry,
      ", which has ", cache.capacity_bytes(entry) / row_bytes, " rows of ", row_bytes, " bytes.");
  return numpy_view(cache.data(entry),
                    {static_cast<size_t>(num_rows), row_bytes / dtype_bytes(dtype)}, dtype, self);
}

// Rows [T, heads * dim] in float32 into the first rows of an entry, in the cache's format.
void write_rows(const KvCache& cache, size_t entry, ArrayObject object, int64_t num_heads,
                const std::string& dtype) {
  const Array rows(object, false, "rows");
  rows.require_dtype(DType::kFloat32, "rows");
  require(rows.sizes().size() == 2 && num_heads >= 1 && rows.sizes()[1] % num_heads == 0,
          "rows must be [T, heads * head size].");
  const auto* format = std::ranges::find_if(
      kCacheFormats, [&](CacheFormat known) { return dtype == format_name(known); });
  require(format != std::end(kCacheFormats), "there is no cache in ", dtype, ".");
  const int64_t num_rows = rows.sizes()[0];
  const int64_t dim = rows.sizes()[1] / num_heads;
  const auto row_bytes = static_cast<int64_t>(cache.row_bytes(entry));
  require(num_heads * head_bytes(*format, dim) == row_bytes &&
              num_rows <= static_cast<int64_t>(cache.capacity_bytes(entry)) / row_bytes,
          num_rows, " rows of ", num_heads, " heads of ", dim, " numbers in ", dtype,
          " do not fit entry ", entry, ", whose rows have ", row_bytes, " bytes.");
  write_cache_heads(*format, static_cast<const float*>(rows.data()), num_rows * num_heads, dim,
                    cache.data(entry));
}

nb::ndarray<nb::numpy> buffer_view(nb::handle_t<Buffers> self, size_t id,
                                   const std::vector<size_t>& shape,
                                   const std::string& dtype_text) {
  const auto& buffers = nb::cast<const Buffers&>(self);
  const DType dtype = dtype_from_name(dtype_text);
  size_t remaining = buffers.bytes(id) / dtype_bytes(dtype);
  for (const size_t size : shape) {
    require(size == 0 || remaining / size > 0, "a view of this shape and dtype ", dtype_text,
            " does not fit buffer ", id, ", which has ", buffers.bytes(id), " bytes.");
    remaining /= size > 0 ? size : 1;
  }
  return numpy_view(buffers.data(id), shape, dtype, self);
}

// An owner that lets a buffer of Python's go when the last region over it goes.
RegionHandle region_of(ArrayObject object, bool is_writable) {
  auto array = std::make_unique<Array>(object, is_writable, "a region");
  void* data = array->data();
  const size_t bytes = array->nbytes();
  return {data, bytes,
          std::shared_ptr<void>(array.release(),
                                [](void* held) {
                                  const nb::gil_scoped_acquire acquire;
                                  delete static_cast<Array*>(held);
                                }),
          is_writable};
}

}  // namespace

void bind_memory(nb::module_& m) {
  nb::class_<RegionHandle>(m, "Region", "Memory that tasks read and write; keeps its owner alive.")
      .def_static(
          "of", &region_of, "array"_a, "writable"_a = true,
          "The memory of a C-contiguous array; one that is not `writable` may be read-only, "
          "and no task may write it.")
      .def_prop_ro("address",
                   [](const RegionHandle& self) { return reinterpret_cast<uintptr_t>(self.data); })
      .def_ro("nbytes", &RegionHandle::bytes)
      .def_ro("writable", &RegionHandle::is_writable);

  nb::class_<KvCache>(m, "KvCache",
                      "Rows that grow with the tokens; memory is committed as it is written.")
      .def(nb::init<std::vector<size_t>, int64_t, int64_t, const std::vector<int64_t>&>(),
           "row_bytes"_a, "max_tokens"_a, "slack_tokens"_a = 0,
           "windows"_a = std::vector<int64_t>{})
      .def_prop_ro("num_entries", &KvCache::num_entries)
      .def_prop_ro("max_tokens", &KvCache::max_tokens)
      .def_prop_ro("length", &KvCache::length)
      .def_prop_ro("committed_bytes", &KvCache::committed_bytes)
      .def_prop_ro("peak_bytes", &KvCache::peak_bytes)
      .def("row_bytes", &KvCache::row_bytes, "entry"_a)
      .def("note_length", &KvCache::note_length, "num_tokens"_a, "num_padding"_a = 0)
      .def("prepare", &KvCache::prepare, "end"_a)
      .def_prop_ro("least_length", &KvCache::least_length)
      .def("truncate", &KvCache::truncate, "num_tokens"_a, "is_forced"_a = false,
           nb::call_guard<nb::gil_scoped_release>())
      .def(
          "region",
          [](std::shared_ptr<KvCache> self, size_t entry) {
            return RegionHandle{self->data(entry), self->capacity_bytes(entry), self};
          },
          "entry"_a)
      .def("write", &write_rows, "entry"_a, "rows"_a, "num_heads"_a, "dtype"_a,
           "Write float32 rows [T, heads * head size] into the first rows of an entry, in its "
           "format.")
      .def("view", &cache_view, "entry"_a, "num_rows"_a, "dtype"_a = "float32",
           "A NumPy view [num_rows, row_bytes / itemsize]; reading commits no memory, writing "
           "does.");

  nb::class_<Buffers>(m, "Buffers", "Buffers that the runtime owns, aligned to 64 bytes, zeroed.")
      .def(nb::init<const std::vector<size_t>&>(), "sizes_bytes"_a)
      .def_prop_ro("total_bytes", &Buffers::total_bytes)
      .def("__len__", &Buffers::num_buffers)
      .def("bytes", &Buffers::bytes, "id"_a)
      .def(
          "address",
          [](const Buffers& self, size_t id) { return reinterpret_cast<uintptr_t>(self.data(id)); },
          "id"_a)
      .def(
          "region",
          [](std::shared_ptr<Buffers> self, size_t id) {
            return RegionHandle{self->data(id), self->bytes(id), self};
          },
          "id"_a)
      .def("view", &buffer_view, "id"_a, "shape"_a, "dtype"_a = "float32",
           "A NumPy view of the buffer's beginning.");
}

}  // namespace doubleweave::python

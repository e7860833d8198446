#include "array.h"

#include <nanobind/ndarray.h>

#include <limits>
#include <utility>

namespace doubleweave::python {

namespace nb = nanobind;

namespace {

// From a format character of Python's struct module and the size of an element.
DType dtype_from_format(const char* format, Py_ssize_t item_bytes, const std::string& what) {
  const std::string text = format == nullptr ? "B" : format;
  const char kind = text.empty() ? 'B' : text.back();
  switch (kind) {
    case '?':
      return DType::kBool;
    case 'e':
      return DType::kFloat16;
    case 'f':
      return DType::kFloat32;
    case 'd':
      return DType::kFloat64;
    case 'b':
      return DType::kInt8;
    case 'B':
      return DType::kUInt8;
    case 'h':
      return DType::kInt16;
    case 'H':
      return DType::kUInt16;
    case 'i':
    case 'l':
    case 'q':
      return item_bytes == 4 ? DType::kInt32 : DType::kInt64;
    default:
      throw nb::type_error(
          (what + " has elements of format '" + text + "', which no method takes.").c_str());
  }
}

nb::dlpack::dtype dlpack_dtype(DType dtype) {
  const auto bits = static_cast<uint8_t>(dtype_bytes(dtype) * 8);
  using Code = nb::dlpack::dtype_code;
  switch (dtype) {
    case DType::kFloat16:
    case DType::kFloat32:
    case DType::kFloat64:
      return {static_cast<uint8_t>(Code::Float), bits, 1};
    case DType::kBool:
      return {static_cast<uint8_t>(Code::Bool), bits, 1};
    case DType::kUInt8:
    case DType::kUInt16:
    case DType::kBFloat16:
      return {static_cast<uint8_t>(Code::UInt), bits, 1};
    default:
      return {static_cast<uint8_t>(Code::Int), bits, 1};
  }
}

}  // namespace

Array::Array(nb::handle object, bool is_writable, const std::string& what) {
  const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (is_writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
    PyErr_Clear();
    const std::string type = Py_TYPE(object.ptr())->tp_name;
    throw nb::type_error((what + " must be a C-contiguous" + (is_writable ? ", writable" : "") +
                          " array, but is a " + type + " that is not.")
                             .c_str());
  }
  is_held_ = true;
  try {
    dtype_ = dtype_from_format(view_.format, view_.itemsize, what);
    for (int dim = 0; dim < view_.ndim; ++dim) {
      if (view_.shape[dim] > std::numeric_limits<int32_t>::max()) {
        throw nb::type_error((what + " has more than 2^31 - 1 elements in a dimension.").c_str());
      }
      sizes_.push_back(static_cast<int32_t>(view_.shape[dim]));
    }
  } catch (...) {
    PyBuffer_Release(&view_);
    throw;
  }
}

Array::Array(Array&& other) noexcept
    : view_(other.view_),
      is_held_(std::exchange(other.is_held_, false)),
      dtype_(other.dtype_),
      sizes_(std::move(other.sizes_)) {}

Array::~Array() {
  if (is_held_) {
    PyBuffer_Release(&view_);
  }
}

void Array::require_dtype(DType dtype, const std::string& what) const {
  if (dtype_ != dtype && !(dtype == DType::kBFloat16 && dtype_ == DType::kUInt16)) {
    throw nb::type_error(
        (what + " has dtype " + dtype_name(dtype_) + ", expected " + dtype_name(dtype) + ".")
            .c_str());
  }
}

DType dtype_from_name(const std::string& name) {
  for (const DType dtype :
       {DType::kUInt8, DType::kInt8, DType::kInt16, DType::kInt32, DType::kInt64, DType::kFloat16,
        DType::kFloat32, DType::kFloat64, DType::kBool, DType::kBFloat16, DType::kUInt16}) {
    if (dtype_name(dtype) == name) {
      return dtype;
    }
  }
  throw nb::value_error(
      ("there is no dtype '" + name + "'; use one such as 'float32' or 'int64'.").c_str());
}

nb::object numpy_view(void* data, const std::vector<size_t>& shape, DType dtype, nb::handle owner) {
  nb::ndarray<nb::numpy> array(data, shape.size(), shape.data(), owner, /*strides=*/nullptr,
                               dlpack_dtype(dtype));
  return nb::cast(std::move(array), nb::rv_policy::reference);
}

}  // namespace doubleweave::python

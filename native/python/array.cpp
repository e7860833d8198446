#include "array.h"

#include <array>
#include <limits>
#include <map>
#include <string_view>

namespace doubleweave::python {

namespace nb = nanobind;

namespace {

// dlpack_dtype gives kBFloat16 as 16 unsigned bits, for NumPy has no bfloat16; kUInt16 comes first.
constexpr std::array kDTypes{DType::kUInt8, DType::kInt8,    DType::kInt16,   DType::kInt32,
                             DType::kInt64, DType::kFloat16, DType::kFloat32, DType::kFloat64,
                             DType::kBool,  DType::kUInt16,  DType::kBFloat16};

[[noreturn]] void refuse(const std::string& message) { throw nb::type_error(message.c_str()); }

// From a format character of Python's struct module and the size of an element.
DType dtype_from_format(const char* format, Py_ssize_t item_bytes, const std::string& what) {
  static const std::map<char, DType> kFormats{
      {'?', DType::kBool},  {'e', DType::kFloat16}, {'f', DType::kFloat32}, {'d', DType::kFloat64},
      {'b', DType::kInt8},  {'B', DType::kUInt8},   {'h', DType::kInt16},   {'H', DType::kUInt16},
      {'i', DType::kInt32}, {'l', DType::kInt64},   {'q', DType::kInt64}};
  const std::string text = format == nullptr ? "B" : format;
  // One character, in this machine's byte order: 'Zf' is complex, '>f' big-endian.
  const bool has_order =
      !text.empty() && std::string_view("@=<").find(text[0]) != std::string::npos;
  const bool is_plain = text.size() == (has_order ? 2 : 1);
  const auto found = is_plain ? kFormats.find(text.back()) : kFormats.end();
  if (found == kFormats.end()) {
    refuse(what + " has elements of format '" + text + "', which no method takes.");
  }
  // The platform, and a prefix, decide how long an 'l' is; an 'i' has 4 bytes on all of ours.
  return found->second == DType::kInt64 && item_bytes == 4 ? DType::kInt32 : found->second;
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

// What lies behind a DLPack capsule, before version 1.0 and since.
struct ManagedTensor {
  nb::dlpack::dltensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
struct VersionedManagedTensor {
  uint32_t major;
  uint32_t minor;
  void* context;
  void (*deleter)(VersionedManagedTensor*);
  uint64_t flags;
  nb::dlpack::dltensor tensor;
};
constexpr uint64_t kReadOnlyFlag = 1;

DType dtype_from_dlpack(nb::dlpack::dtype dtype, const std::string& what) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) {
    return dtype.code == static_cast<uint8_t>(code) && dtype.bits == bits && dtype.lanes == 1;
  };
  if (is(Code::Bfloat, 16)) {
    return DType::kBFloat16;
  }
  for (const DType known : kDTypes) {
    const nb::dlpack::dtype expected = dlpack_dtype(known);
    if (is(static_cast<Code>(expected.code), expected.bits)) {
      return known;
    }
  }
  refuse(what + " has elements of DLPack's type code " + std::to_string(dtype.code) + " with " +
         std::to_string(dtype.bits) + " bits, which no method takes.");
}

// Memory that this processor reads and writes: its own, or page-locked for CUDA or ROCm.
bool is_on_cpu(nb::dlpack::device device) {
  return device.device_type == nb::device::cpu::value ||
         device.device_type == nb::device::cuda_host::value ||
         device.device_type == nb::device::rocm_host::value;
}

bool is_contiguous(const nb::dlpack::dltensor& tensor) {
  if (tensor.strides == nullptr) {
    return true;
  }
  int64_t stride = 1;
  bool result = true;
  for (int32_t dim = tensor.ndim - 1; dim >= 0; --dim) {
    if (tensor.shape[dim] == 0) {
      return true;
    }
    result = result && (tensor.shape[dim] == 1 || tensor.strides[dim] == stride);
    stride *= tensor.shape[dim];
  }
  return result;
}

std::string python_type(nb::handle object) { return Py_TYPE(object.ptr())->tp_name; }

[[noreturn]] void throw_not_an_array(nb::handle object, bool is_writable, const std::string& what) {
  refuse(what + " must be a C-contiguous" + (is_writable ? ", writable" : "") +
         " array, but is a " + python_type(object) + " that is not.");
}

// Calls __dlpack__, for version 1.0 where the object knows it.
nb::object dlpack_capsule(nb::handle object, const std::string& what) {
  const nb::object method = object.attr("__dlpack__");
  try {
    try {
      return method(nb::arg("max_version") = nb::make_tuple(1, 0));
    } catch (nb::python_error& error) {
      if (!error.matches(PyExc_TypeError)) {
        throw;
      }
    }
    return method();
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_Exception)) {
      throw;
    }
    const std::string found = what + " is a " + python_type(object);
    if (nb::bool_(nb::getattr(object, "requires_grad", nb::bool_(false)))) {
      refuse(found + " that requires grad; call .detach() on it.");
    }
    std::string reason = nb::str(error.value()).c_str();
    reason.erase(reason.find_last_not_of(". \n") + 1);
    refuse(found + " that gives no memory through DLPack: " + reason + ".");
  }
}

}  // namespace

Array::Array(nb::handle object, bool is_writable, const std::string& what) {
  const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (is_writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), &view_, flags) == 0) {
    is_held_ = true;
    try {
      read_buffer(what);
    } catch (...) {
      PyBuffer_Release(&view_);
      throw;
    }
    return;
  }
  PyErr_Clear();
  if (!nb::hasattr(object, "__dlpack__")) {
    throw_not_an_array(object, is_writable, what);
  }
  capsule_ = dlpack_capsule(object, what);
  read_capsule(object, is_writable, what);
}

void Array::read_buffer(const std::string& what) {
  data_ = view_.buf;
  nbytes_ = static_cast<size_t>(view_.len);
  dtype_ = dtype_from_format(view_.format, view_.itemsize, what);
  for (int dim = 0; dim < view_.ndim; ++dim) {
    add_size(view_.shape[dim], what);
  }
}

void Array::read_capsule(nb::handle object, bool is_writable, const std::string& what) {
  const nb::dlpack::dltensor* tensor = nullptr;
  bool may_be_written = false;
  if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned") != 0) {
    const auto* managed = static_cast<const VersionedManagedTensor*>(
        PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
    if (managed->major == 1) {
      tensor = &managed->tensor;
      may_be_written = (managed->flags & kReadOnlyFlag) == 0;
    }
  } else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor") != 0) {
    tensor = &static_cast<const ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))
                  ->tensor;
  }
  if (tensor == nullptr) {
    refuse(what + " is a " + python_type(object) +
           " whose __dlpack__ gives no DLPack tensor of version 1 or before.");
  }
  if (!is_on_cpu(tensor->device)) {
    refuse(what + " is a " + python_type(object) + " on another device (DLPack's " +
           std::to_string(tensor->device.device_type) +
           "), expected the CPU; copy it there first.");
  }
  if (!is_contiguous(*tensor) || (is_writable && !may_be_written)) {
    throw_not_an_array(object, is_writable, what);
  }
  data_ = static_cast<std::byte*>(tensor->data) + tensor->byte_offset;
  dtype_ = dtype_from_dlpack(tensor->dtype, what);
  nbytes_ = dtype_bytes(dtype_);
  for (int32_t dim = 0; dim < tensor->ndim; ++dim) {
    add_size(tensor->shape[dim], what);
    nbytes_ *= static_cast<size_t>(tensor->shape[dim]);
  }
}

void Array::add_size(int64_t size, const std::string& what) {
  if (size > std::numeric_limits<int32_t>::max()) {
    refuse(what + " has more than 2^31 - 1 elements in a dimension.");
  }
  sizes_.push_back(static_cast<int32_t>(size));
}

Array::~Array() {
  if (is_held_) {
    PyBuffer_Release(&view_);
  }
}

void Array::require_dtype(DType dtype, const std::string& what) const {
  if (dtype_ != dtype && !(dtype == DType::kBFloat16 && dtype_ == DType::kUInt16)) {
    refuse(what + " has dtype " + dtype_name(dtype_) + ", expected " + dtype_name(dtype) + ".");
  }
}

DType dtype_from_name(const std::string& name) {
  for (const DType dtype : kDTypes) {
    if (dtype_name(dtype) == name) {
      return dtype;
    }
  }
  throw nb::value_error(
      ("there is no dtype '" + name + "'; use one such as 'float32' or 'int64'.").c_str());
}

nb::ndarray<nb::numpy> numpy_view(void* data, const std::vector<size_t>& shape, DType dtype,
                                  nb::handle owner) {
  return {data, shape.size(), shape.data(), owner, /*strides=*/nullptr, dlpack_dtype(dtype)};
}

}  // namespace doubleweave::python

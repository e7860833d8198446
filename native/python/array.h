// Arrays that come from Python, through the buffer protocol (NumPy arrays, memoryviews,
// array.array) or DLPack (PyTorch tensors, JAX arrays).
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "doubleweave/program.h"

namespace doubleweave::python {

/// What Array is made of; native/python/stubs.pat says which types that are.
struct ArrayObject : nanobind::object {
  NB_OBJECT_DEFAULT(ArrayObject, nanobind::object, "_Array", [](PyObject*) { return true; })
};

/// A C-contiguous array, held for as long as this lives. Needs the GIL to be made and destroyed.
class Array {
 public:
  /// Throws nanobind::type_error, naming `what`, when the object gives no memory of the CPU, is not
  /// C-contiguous, or is read-only (or does not say, as before DLPack 1.0) although `is_writable`
  /// is asked for.
  Array(nanobind::handle object, bool is_writable, const std::string& what);
  ~Array();
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }
  std::span<const int32_t> sizes() const { return sizes_; }
  DType dtype() const { return dtype_; }

  /// Throws nanobind::type_error unless the elements are of this type. NumPy has no bfloat16:
  /// uint16 is taken for it.
  void require_dtype(DType dtype, const std::string& what) const;

 private:
  void read_buffer(const std::string& what);
  void read_capsule(nanobind::handle object, bool is_writable, const std::string& what);
  void add_size(int64_t size, const std::string& what);

  Py_buffer view_{};
  bool is_held_ = false;
  // DLPack's; it gives the memory back when it goes.
  nanobind::object capsule_;
  void* data_ = nullptr;
  size_t nbytes_ = 0;
  DType dtype_{};
  std::vector<int32_t> sizes_;
};

/// The dtype of a name such as "float32". Throws nanobind::value_error for another.
DType dtype_from_name(const std::string& name);

/// A writable NumPy array over memory that `owner` keeps alive.
nanobind::ndarray<nanobind::numpy> numpy_view(void* data, const std::vector<size_t>& shape,
                                              DType dtype, nanobind::handle owner);

}  // namespace doubleweave::python

// Programs and instances: an ExecuTorch program on disk, and its methods loaded with memory of
// their own.
//
// An instance reads its inputs from and writes its outputs to memory that the caller owns: binding
// sets a pointer and sizes, nothing is copied. That needs methods lowered with
// MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False); others work too, with a
// copy. Knows nothing of schedules, caches or Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace doubleweave {

/// Element types, numbered as ExecuTorch (and PyTorch) number them.
enum class DType : int8_t {
  kUInt8 = 0,
  kInt8 = 1,
  kInt16 = 2,
  kInt32 = 3,
  kInt64 = 4,
  kFloat16 = 5,
  kFloat32 = 6,
  kFloat64 = 7,
  kBool = 11,
  kBFloat16 = 15,
  kUInt16 = 27,
};

/// "float32" and so on; "dtype 13" for one without a name here.
std::string dtype_name(DType dtype);

/// The size of one element in bytes, 0 for a dtype without a name here.
size_t dtype_bytes(DType dtype);

/// What a method expects of one input, or gives as one output.
struct TensorInfo {
  DType dtype;
  /// True when the sizes are upper bounds, false when they are the only ones possible.
  bool is_dynamic;
  /// Sizes, or their upper bounds, outermost first; row-major without gaps.
  std::vector<int32_t> sizes;
  /// Bytes at the upper bound.
  size_t nbytes;
};

/// Memory to read an input from; see Instance::bind_input.
struct InputBinding {
  const void* data;
  std::span<const int32_t> sizes;
};

/// Memory to write an output to; see Instance::bind_output.
struct OutputBinding {
  void* data;
  size_t capacity_bytes;
  std::span<const int32_t> sizes;
};

/// A loaded method with its own memory. Not thread safe: one thread at a time binds and executes.
class Instance {
 public:
  struct Impl;
  ~Instance();
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;

  const std::string& method() const;
  const std::vector<TensorInfo>& inputs() const;
  const std::vector<TensorInfo>& outputs() const;

  /// Reads input `index` from `data`, row-major, `sizes` elements, at every following execute().
  /// XNNPACK may read (never use) up to 16 bytes past the end; Buffers and KvCache leave room for
  /// it. Throws Error for an index, rank or size out of range, or a null pointer.
  void bind_input(size_t index, const void* data, std::span<const int32_t> sizes);

  /// Writes output `index` to `data` at every following execute(). `sizes` are the exact sizes that
  /// the method will give; empty means not known, and then `capacity_bytes` must hold the upper
  /// bound. Throws Error for an index, rank or size out of range, a null pointer, or too little
  /// capacity.
  void bind_output(size_t index, void* data, size_t capacity_bytes, std::span<const int32_t> sizes);

  /// Runs the method on what is bound, on the calling thread and the intra-operator threads
  /// (threads.h). Throws Error when an input or output is not bound, when the instance runs on
  /// another thread, when the method fails, or when an output came out in other sizes than those
  /// given to bind_output.
  void execute();

  /// Binds everything and executes; no other thread can come between the two. `threads` sets
  /// the number of intra-operator threads (threads.h), waiting for runs that use another one; 0
  /// keeps what is set.
  void run(std::span<const InputBinding> inputs, std::span<const OutputBinding> outputs,
           int threads = 0);

  /// The sizes of output `index` after the last execute().
  std::vector<int32_t> output_sizes(size_t index) const;

 private:
  friend class Program;
  friend class Execution;
  explicit Instance(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

/// A program file, mapped into memory. Instances keep what they need of it alive.
class Program {
 public:
  /// With `digests`, of the file's chunks of kDigestChunkBytes (digest.h), everything that is read
  /// of the file is compared with them before it is used. Throws Error, naming the path, when the
  /// file is missing, truncated, damaged or not an ExecuTorch program.
  explicit Program(const std::string& path, std::vector<uint64_t> digests = {});
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  /// Lets go of the file's pages (constants are read from them); used ones come back on demand.
  void trim() const;

  const std::string& path() const;
  const std::vector<std::string>& method_names() const;

  /// Loads a method: delegates compile or unpack their part and pack weights now. Thread safe.
  ///
  /// Instances of one workspace group share XNNPACK's scratch memory, and one that reaches a
  /// delegate while another is in one waits for it. Instances of different groups never wait for
  /// one another. Groups are counted within a Program object; -1: a group of its own.
  ///
  /// Throws Error for an unknown method, a missing operator or backend, or an input that is not a
  /// tensor.
  /// With a `packed_path`, of at most 255 bytes and for this method of this program alone, the
  /// weights as XNNPACK packs them lie in that file: it is mapped, or written if it is not there.
  std::unique_ptr<Instance> load(const std::string& method, int workspace_group = -1,
                                 const std::string& packed_path = "") const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace doubleweave

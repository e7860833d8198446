// What Instance is made of; shared by program.cpp (which loads), instance.cpp and execution.cpp.
#pragma once

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>

#include <atomic>
#include <map>
#include <mutex>
#include <new>
#include <optional>

#include "doubleweave/program.h"
#include "doubleweave/threads.h"

namespace doubleweave {

/// Blocks of memory that are freed together.
class Arena {
 public:
  Arena() = default;
  ~Arena() {
    for (const auto& [pointer, alignment] : blocks_) {
      ::operator delete(pointer, std::align_val_t{alignment});
    }
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Returns null when there is no memory, as ExecuTorch's allocators do.
  void* allocate(size_t size, size_t alignment) {
    void* pointer = ::operator new(size == 0 ? 1 : size, std::align_val_t{alignment}, std::nothrow);
    if (pointer != nullptr) {
      blocks_.emplace_back(pointer, alignment);
    }
    return pointer;
  }

 private:
  std::vector<std::pair<void*, size_t>> blocks_;
};

/// The method allocator of all instances of one workspace group. In XNNPACK's sharing mode "per
/// model" its address is what tells one workspace from another. While an instance loads, its memory
/// comes from the instance's own arena, so that it goes when the instance goes.
class GroupAllocator final : public executorch::runtime::MemoryAllocator {
 public:
  GroupAllocator() : MemoryAllocator(0, nullptr) {}

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    if (!isPowerOf2(alignment)) {
      return nullptr;
    }
    const std::lock_guard lock(mutex_);
    return (loading_ != nullptr ? *loading_ : late_).allocate(size, alignment);
  }

  void set_loading(Arena* arena) {
    const std::lock_guard lock(mutex_);
    loading_ = arena;
  }

  /// Memory for a method's own values, one block for all instances of the group: it holds nothing
  /// between runs. `index` and `size_bytes` are those of the planned buffer. Null: no memory.
  void* planned(size_t index, size_t size_bytes) {
    const std::lock_guard lock(mutex_);
    void*& block = planned_[{index, size_bytes}];
    if (block == nullptr) {
      block = late_.allocate(size_bytes, /*alignment=*/64);
    }
    return block;
  }

  /// Held while an instance of the group loads.
  std::mutex load_mutex;
  /// Held while an instance of the group runs, where several may be in it.
  std::mutex run_mutex;
  bool is_shared = false;

 private:
  std::mutex mutex_;
  Arena* loading_ = nullptr;
  Arena late_;
  std::map<std::pair<size_t, size_t>, void*> planned_;
};

struct ProgramState;

struct InputSlot {
  executorch::aten::TensorImpl* tensor = nullptr;
  const void* data = nullptr;
  // The method has memory of its own for this input: copy before the run.
  bool is_planned = false;
};

struct OutputSlot {
  executorch::runtime::EValue* value = nullptr;
  // Takes the place of the method's own tensor, so that its capacity is what was bound: ExecuTorch
  // then refuses to write more. Not used for outputs whose memory the method determines.
  std::optional<executorch::aten::TensorImpl> tensor;
  executorch::aten::TensorImpl* original = nullptr;
  // The tensor's current sizes and strides; a run may change them.
  std::vector<int32_t> sizes;
  std::vector<int32_t> strides;
  std::vector<int32_t> bound_sizes;
  void* data = nullptr;
  size_t capacity_bytes = 0;
  // The sizes must come out as bound.
  bool is_exact = false;
  // Planned memory, an input passed through, or another output's value: copy after the run.
  bool is_foreign = false;
};

struct Instance::Impl {
  PoolUse pool_use;
  std::shared_ptr<ProgramState> program;
  std::string method_name;
  std::vector<TensorInfo> input_infos;
  std::vector<TensorInfo> output_infos;

  std::shared_ptr<GroupAllocator> group;
  Arena arena;
  executorch::extension::MallocMemoryAllocator temp_allocator;
  std::vector<executorch::runtime::Span<uint8_t>> planned_spans;
  std::optional<executorch::runtime::HierarchicalAllocator> planned_memory;
  std::optional<executorch::runtime::MemoryManager> memory;
  std::optional<executorch::runtime::Method> method;

  std::vector<InputSlot> inputs;
  std::vector<OutputSlot> outputs;
  std::atomic<bool> in_use{false};
  // XNNPACK plans its scratch memory when sizes grow; where it packs rows as it goes
  // (reshape_fully_connected_nc), for as many threads as take part then, and not anew when more do.
  // So the first run at sizes that grow is one with every thread of the pool.
  bool is_delegated = false;
  // Sizes of all inputs, one behind the other, at which it ran with every thread.
  mutable std::mutex room_mutex;
  std::vector<std::vector<int32_t>> roomy_sizes;
  // A check inside ExecuTorch failed while it ran: its state is unknown.
  bool is_broken = false;

  /// Throws Error if `sizes` cannot be bound to the input (output) `index`; `kind` is "input" or
  /// "output", and `infos` are of that kind.
  void check_sizes(const char* kind, size_t index, const std::vector<TensorInfo>& infos,
                   std::span<const int32_t> sizes) const;
  void bind_input(size_t index, const void* data, std::span<const int32_t> sizes);
  void bind_output(size_t index, void* data, size_t capacity_bytes, std::span<const int32_t> sizes);
  void execute(bool single_thread);
  /// Whether scratch memory is planned for every thread at these sizes.
  bool has_room(const std::vector<int32_t>& sizes) const;
  /// Notes that the method ran at these sizes with every thread.
  void note_room(std::vector<int32_t> sizes);
  /// Runs the method on zeros with every thread, unless there is room at these sizes (those of all
  /// inputs, one behind the other); waits until nothing else runs. It leaves nothing bound.
  void make_room(std::vector<int32_t> sizes);
  void finish_output(size_t index);
};

/// Marks an instance as in use by this thread. Throws Error when another thread uses it.
class InstanceUse {
 public:
  explicit InstanceUse(Instance::Impl& impl);
  ~InstanceUse();
  InstanceUse(const InstanceUse&) = delete;
  InstanceUse& operator=(const InstanceUse&) = delete;

 private:
  Instance::Impl& impl_;
};

}  // namespace doubleweave

#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>

#include "crash_scope.h"
#include "doubleweave/error.h"
#include "doubleweave/threads.h"
#include "instance_impl.h"
#include "runtime_log.h"

namespace doubleweave {

namespace et = executorch::runtime;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::aten::TensorShapeDynamism;
using executorch::extension::threadpool::NoThreadPoolGuard;

InstanceUse::InstanceUse(Instance::Impl& impl) : impl_(impl) {
  require(!impl_.in_use.exchange(true, std::memory_order_acquire), "the instance of method '",
          impl.method_name,
          "' is in use on another thread; load a second instance to run both at once.");
}

InstanceUse::~InstanceUse() { impl_.in_use.store(false, std::memory_order_release); }

void Instance::Impl::check_sizes(const char* kind, size_t index,
                                 const std::vector<TensorInfo>& infos,
                                 std::span<const int32_t> sizes) const {
  require(index < infos.size(), "method '", method_name, "' has ", infos.size(), " ", kind,
          "s, but ", kind, " ", index, " was named.");
  const TensorInfo& info = infos[index];
  bool fits = sizes.size() == info.sizes.size();
  for (size_t dim = 0; fits && dim < sizes.size(); ++dim) {
    fits = info.is_dynamic
               ? sizes[dim] <= info.sizes[dim] && sizes[dim] >= std::min(1, info.sizes[dim])
               : sizes[dim] == info.sizes[dim];
  }
  require(fits, "method '", method_name, "': ", kind, " ", index, " has sizes ", SizesText{sizes},
          ", expected ", info.is_dynamic ? "at least 1 and at most " : "", SizesText{info.sizes},
          ".");
}

void Instance::Impl::bind_input(size_t index, const void* data, std::span<const int32_t> sizes) {
  check_sizes("input", index, input_infos, sizes);
  InputSlot& slot = inputs[index];
  require(data != nullptr, "method '", method_name, "': input ", index,
          " is bound to a null pointer.");
  const auto current = slot.tensor->sizes();
  if (!std::equal(sizes.begin(), sizes.end(), current.begin())) {
    Tensor tensor(slot.tensor);
    require(et::resize_tensor(tensor, {sizes.data(), sizes.size()}) == et::Error::Ok, "method '",
            method_name, "': input ", index, " cannot take sizes ", SizesText{sizes}, ".");
  }
  slot.data = data;
  if (!slot.is_planned) {
    slot.tensor->set_data(const_cast<void*>(data));
  }
}

void Instance::Impl::bind_output(size_t index, void* data, size_t capacity_bytes,
                                 std::span<const int32_t> sizes) {
  const bool is_exact = !sizes.empty();
  if (!is_exact && index < output_infos.size()) {
    sizes = output_infos[index].sizes;
  }
  check_sizes("output", index, output_infos, sizes);
  OutputSlot& slot = outputs[index];
  size_t nbytes = dtype_bytes(output_infos[index].dtype);
  for (const int32_t size : sizes) {
    nbytes *= static_cast<size_t>(size);
  }
  require(data != nullptr && capacity_bytes >= nbytes, "method '", method_name, "': output ", index,
          " needs ", nbytes, " bytes for sizes ", SizesText{sizes},
          is_exact ? "" : " (its upper bound, for no sizes were given)", ", but ",
          data == nullptr ? 0 : capacity_bytes, " were bound.");
  slot.data = data;
  slot.capacity_bytes = capacity_bytes;
  slot.is_exact = is_exact;
  std::ranges::copy(sizes, slot.sizes.begin());
  std::ranges::copy(sizes, slot.bound_sizes.begin());
  if (slot.is_foreign) {
    return;
  }
  int32_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    slot.strides[dim] = stride;
    stride *= std::max(1, sizes[dim]);
  }
  // Its capacity is fixed when it is made, so it is made anew; this allocates nothing.
  slot.tensor.emplace(slot.original->scalar_type(), static_cast<ssize_t>(sizes.size()),
                      slot.sizes.data(), data,
                      const_cast<uint8_t*>(slot.original->dim_order().data()), slot.strides.data(),
                      TensorShapeDynamism::DYNAMIC_BOUND);
  *slot.value = et::EValue(Tensor(&*slot.tensor));
}

void Instance::Impl::execute(bool single_thread) {
  require(!is_broken, "method '", method_name,
          "' cannot run again: a check inside ExecuTorch failed in it.");
  // Instances of one group share planned memory: two of them at once would overwrite each other's.
  std::unique_lock<std::mutex> turn;
  if (group->is_shared) {
    turn = std::unique_lock(group->run_mutex);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    require(inputs[i].data != nullptr, "method '", method_name, "': input ", i, " is not bound.");
    if (inputs[i].is_planned) {
      std::memcpy(inputs[i].tensor->mutable_data(), inputs[i].data, inputs[i].tensor->nbytes());
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    require(outputs[i].data != nullptr, "method '", method_name, "': output ", i, " is not bound.");
  }
  const LogScope log;
  const CrashScope crash(method_name.c_str());
  et::Error error = et::Error::Ok;
  try {
    // Kernels outside delegates would take the pool's lock even for one thread.
    std::optional<NoThreadPoolGuard> guard;
    if (single_thread) {
      guard.emplace();
    }
    error = method->execute();
  } catch (const FatalCheck&) {
    is_broken = true;
    throw;
  }
  if (error != et::Error::Ok) {
    throw Error(text("method '", method_name, "' failed: ", failure_text(error), "."));
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    finish_output(i);
  }
}

void Instance::Impl::finish_output(size_t index) {
  const OutputSlot& slot = outputs[index];
  const TensorImpl& tensor = *slot.value->toTensor().unsafeGetTensorImpl();
  const auto sizes = tensor.sizes();
  require(!slot.is_exact || std::ranges::equal(sizes, slot.bound_sizes), "method '", method_name,
          "': output ", index, " came out with sizes ", SizesText{{sizes.data(), sizes.size()}},
          ", but was bound with ", SizesText{slot.bound_sizes}, ".");
  if (tensor.data() == slot.data || tensor.nbytes() == 0) {
    return;
  }
  // Not written in place: an input passed through or viewed, a planned output, a branch's value.
  require(tensor.data() != nullptr && tensor.nbytes() <= slot.capacity_bytes, "method '",
          method_name, "': output ", index, " came out with ", tensor.nbytes(), " bytes, but ",
          slot.capacity_bytes, " were bound.");
  std::memmove(slot.data, tensor.data(), tensor.nbytes());
}

// Scratch memory grows with every input size, so room at some sizes is room at all smaller ones.
bool Instance::Impl::has_room(const std::vector<int32_t>& sizes) const {
  if (!is_delegated || pool_threads() == 1) {
    return true;
  }
  const std::lock_guard lock(room_mutex);
  return std::ranges::any_of(roomy_sizes, [&](const auto& roomy) {
    return std::ranges::equal(sizes, roomy, std::less_equal<>());
  });
}

void Instance::Impl::note_room(std::vector<int32_t> sizes) {
  const std::lock_guard lock(room_mutex);
  // Entries that the new one covers go, so that the list stays as short as it can be.
  std::erase_if(roomy_sizes, [&](const auto& roomy) {
    return std::ranges::equal(roomy, sizes, std::less_equal<>());
  });
  roomy_sizes.push_back(std::move(sizes));
}

void Instance::Impl::make_room(std::vector<int32_t> sizes) {
  if (has_room(sizes)) {
    return;
  }
  const IntraOpScope scope(pool_threads());
  // Unlike a run, which refuses an instance in use, preparing waits for it: a scope that agrees
  // on the threads may be inside.
  while (in_use.exchange(true, std::memory_order_acquire)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  in_use.store(false, std::memory_order_release);
  const InstanceUse use(*this);
  if (has_room(sizes)) {  // another thread may have made it meanwhile
    return;
  }
  // XNNPACK reads up to 16 bytes past the end.
  constexpr size_t kMargin = 64;
  std::vector<std::vector<std::byte>> memory;
  const auto zeros = [&](const TensorInfo& info, std::span<const int32_t> of) {
    size_t bytes = dtype_bytes(info.dtype);
    for (const int32_t size : of) {
      bytes *= static_cast<size_t>(size);
    }
    return memory.emplace_back(bytes + kMargin).data();
  };
  std::span<const int32_t> rest = sizes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto own = rest.first(input_infos[i].sizes.size());
    bind_input(i, zeros(input_infos[i], own), own);
    rest = rest.subspan(own.size());
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    bind_output(i, zeros(output_infos[i], output_infos[i].sizes), output_infos[i].nbytes, {});
  }
  try {
    execute(false);
  } catch (const Error&) {
    // It planned before it failed; whether real inputs fail shows when they run.
  }
  for (InputSlot& slot : inputs) {
    slot.data = nullptr;
  }
  for (OutputSlot& slot : outputs) {
    slot.data = nullptr;
  }
  note_room(std::move(sizes));
}

Instance::Instance(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Instance::~Instance() {
  if (impl_->is_broken) {
    // Its locks and memory are in an unknown state: freeing them may hang or crash, so they stay.
    (void)impl_.release();
  }
}

const std::string& Instance::method() const { return impl_->method_name; }

const std::vector<TensorInfo>& Instance::inputs() const { return impl_->input_infos; }

const std::vector<TensorInfo>& Instance::outputs() const { return impl_->output_infos; }

void Instance::bind_input(size_t index, const void* data, std::span<const int32_t> sizes) {
  const InstanceUse use(*impl_);
  impl_->bind_input(index, data, sizes);
}

void Instance::bind_output(size_t index, void* data, size_t capacity_bytes,
                           std::span<const int32_t> sizes) {
  const InstanceUse use(*impl_);
  impl_->bind_output(index, data, capacity_bytes, sizes);
}

namespace {

// Runs `work` with the wanted number of intra-operator threads (0: those that are set), but with
// every thread of the pool where scratch memory is yet to be planned for the sizes.
template <typename Work>
void with_threads(Instance::Impl& impl, std::vector<int32_t> sizes, int wanted, Work work) {
  const bool has_room = impl.has_room(sizes);
  const int before = has_room ? 0 : intra_op_threads();
  {
    const int threads = has_room ? wanted : pool_threads();
    const IntraOpScope scope = threads == 0 ? IntraOpScope() : IntraOpScope(threads);
    const InstanceUse use(impl);
    work();
    const int used = intra_op_threads();
    impl.execute(used == 1);
    if (impl.is_delegated && used == pool_threads() && !impl.has_room(sizes)) {
      impl.note_room(std::move(sizes));
    }
  }
  if (const int after = wanted == 0 ? before : wanted; !has_room && after != intra_op_threads()) {
    set_intra_op_threads(after);
  }
}

}  // namespace

void Instance::execute() {
  std::vector<int32_t> sizes;
  for (const InputSlot& slot : impl_->inputs) {
    const auto found = slot.tensor->sizes();
    sizes.insert(sizes.end(), found.begin(), found.end());
  }
  with_threads(*impl_, std::move(sizes), 0, [] {});
}

void Instance::run(std::span<const InputBinding> inputs, std::span<const OutputBinding> outputs,
                   int threads) {
  require(inputs.size() == impl_->inputs.size() && outputs.size() == impl_->outputs.size(),
          "method '", method(), "' takes ", impl_->inputs.size(), " inputs and gives ",
          impl_->outputs.size(), " outputs, but ", inputs.size(), " and ", outputs.size(),
          " were given.");
  std::vector<int32_t> sizes;
  for (const InputBinding& input : inputs) {
    sizes.insert(sizes.end(), input.sizes.begin(), input.sizes.end());
  }
  with_threads(*impl_, std::move(sizes), threads, [&] {
    for (size_t i = 0; i < inputs.size(); ++i) {
      impl_->bind_input(i, inputs[i].data, inputs[i].sizes);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      impl_->bind_output(i, outputs[i].data, outputs[i].capacity_bytes, outputs[i].sizes);
    }
  });
}

std::vector<int32_t> Instance::output_sizes(size_t index) const {
  require(index < impl_->outputs.size(), "method '", method(), "' has ", impl_->outputs.size(),
          " outputs, but output ", index, " was named.");
  const auto sizes = impl_->outputs[index].value->toTensor().unsafeGetTensorImpl()->sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace doubleweave

#include "doubleweave/program.h"

#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/executor/program.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include "crash_scope.h"
#include "doubleweave/error.h"
#include "file_loader.h"
#include "instance_impl.h"
#include "operators.h"
#include "runtime_log.h"

// The method's own input and output values are reached through accessors that ExecuTorch marks
// deprecated (it offers set_input, which copies metadata, and set_output_data_ptr, which checks the
// wrong size).
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace doubleweave {

namespace et = executorch::runtime;

struct ProgramState {
  std::string path;
  std::optional<FileLoader> loader;
  std::optional<et::Program> program;
  std::vector<std::string> method_names;
};

struct Program::Impl {
  std::shared_ptr<ProgramState> state = std::make_shared<ProgramState>();
  std::mutex groups_mutex;
  std::map<int, std::shared_ptr<GroupAllocator>> groups;
};

namespace {

// A program starts with 8 bytes that carry the flatbuffer identifier, followed by ExecuTorch's
// header.
constexpr size_t kMinProgramBytes = 64;

void check_file(const std::string& path) {
  std::error_code code;
  require(std::filesystem::is_regular_file(path, code), "program '", path,
          "' is not a file that can be read; give the path of a .pte file.");
  const auto size_bytes = std::filesystem::file_size(path, code);
  char head[kMinProgramBytes] = {};
  std::ifstream file(path, std::ios::binary);
  require(file.is_open(), "program '", path, "' cannot be opened: ", std::strerror(errno), ".");
  require(file.read(head, sizeof(head)) && !code, "program '", path, "' has ", size_bytes,
          " bytes, too few for an ExecuTorch program; ", "compile it again.");
  require(
      et::Program::check_header(head, sizeof(head)) == et::Program::HeaderStatus::CompatibleVersion,
      "program '", path, "' does not start like an ExecuTorch program of this version; ",
      "compile it again.");
}

std::string names_text(const std::vector<std::string>& names) {
  std::string result;
  for (const std::string& name : names) {
    result += (result.empty() ? "" : ", ") + name;
    if (result.size() > 300) {
      return result + ", …";
    }
  }
  return result;
}

TensorInfo tensor_info(const executorch::aten::TensorImpl& tensor) {
  return {static_cast<DType>(tensor.scalar_type()),
          tensor.shape_dynamism() != executorch::aten::TensorShapeDynamism::STATIC,
          {tensor.sizes().begin(), tensor.sizes().end()},
          tensor.nbytes()};
}

// The tensor of a method's input or output, or an Error if it is something we cannot bind.
executorch::aten::TensorImpl* bindable_tensor(const std::string& method, const char* kind,
                                              size_t index, const et::EValue& value) {
  require(value.isTensor(), "method '", method, "': ", kind, " ", index,
          " is not a tensor (ExecuTorch's tag ", static_cast<int>(value.tag),
          "); pass tensors only, numbers become part of the method.");
  auto* tensor = value.toTensor().unsafeGetTensorImpl();
  for (size_t dim = 0; dim < tensor->dim_order().size(); ++dim) {
    require(tensor->dim_order()[dim] == dim, "method '", method, "': ", kind, " ", index,
            " is not row-major; export it with contiguous tensors.");
  }
  require(dtype_bytes(static_cast<DType>(tensor->scalar_type())) != 0, "method '", method,
          "': ", kind, " ", index, " has ", dtype_name(static_cast<DType>(tensor->scalar_type())),
          ", which is not supported.");
  return tensor;
}

void find_slots(Instance::Impl& impl, const et::MethodMeta& meta) {
  et::Method& method = *impl.method;
  std::vector<const et::EValue*> seen;
  for (size_t i = 0; i < method.inputs_size(); ++i) {
    et::EValue& value = method.mutable_input(i);
    InputSlot slot;
    slot.tensor = bindable_tensor(impl.method_name, "input", i, value);
    slot.is_planned = meta.input_tensor_meta(i)->is_memory_planned();
    impl.inputs.push_back(slot);
    impl.input_infos.push_back(tensor_info(*slot.tensor));
    seen.push_back(&value);
  }
  impl.outputs = std::vector<OutputSlot>(method.outputs_size());
  for (size_t i = 0; i < method.outputs_size(); ++i) {
    OutputSlot& slot = impl.outputs[i];
    slot.value = &method.mutable_output(i);
    slot.original = bindable_tensor(impl.method_name, "output", i, *slot.value);
    slot.is_foreign = meta.output_tensor_meta(i)->is_memory_planned() ||
                      std::ranges::find(seen, slot.value) != seen.end();
    impl.output_infos.push_back(tensor_info(*slot.original));
    slot.sizes = impl.output_infos.back().sizes;
    slot.bound_sizes = slot.sizes;
    slot.strides.resize(slot.sizes.size());
    seen.push_back(slot.value);
  }
}

void plan_memory(Instance::Impl& impl, const et::MethodMeta& meta) {
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const auto size = static_cast<size_t>(meta.memory_planned_buffer_size(i).get());
    auto* data = static_cast<uint8_t*>(impl.group->planned(i, size));
    require(data != nullptr, "method '", impl.method_name, "' needs ", size,
            " bytes for its own values, and there ", "is not so much memory.");
    impl.planned_spans.emplace_back(data, size);
  }
  impl.planned_memory.emplace(
      et::Span<et::Span<uint8_t>>(impl.planned_spans.data(), impl.planned_spans.size()));
  impl.memory.emplace(impl.group.get(), &*impl.planned_memory, &impl.temp_allocator);
}

// A program may be for a backend that this build of ExecuTorch does not have.
void check_backends(const et::MethodMeta& meta, const std::string& path,
                    const std::string& method) {
  for (size_t i = 0; i < meta.num_backends(); ++i) {
    auto name = meta.get_backend_name(i);
    if (!name.ok() || et::get_backend_class(name.get()) != nullptr) {
      continue;
    }
    std::vector<std::string> known;
    for (size_t number = 0; number < et::get_num_registered_backends(); ++number) {
      if (auto found = et::get_backend_name(number); found.ok()) {
        known.emplace_back(found.get());
      }
    }
    throw Error(text("method '", method, "' of '", path, "' is compiled for backend '", name.get(),
                     "', which this build of ExecuTorch lacks; it has ", names_text(known),
                     ": compile the program for one of them."));
  }
}

void check_digests(const ProgramState& state) {
  require(!state.loader->is_damaged(), "program '", state.path,
          "' was changed or damaged: a part of it has another digest than when it was compiled; ",
          "compile it again.");
}

void load_method(std::unique_ptr<Instance::Impl>& impl,
                 const et::LoadBackendOptionsMap& backend_options) {
  ProgramState& state = *impl->program;
  GroupAllocator& group = *impl->group;
  const std::lock_guard lock(group.load_mutex);
  group.set_loading(&impl->arena);
  const CrashScope crash(impl->method_name.c_str());
  try {
    auto loaded = state.program->load_method(impl->method_name.c_str(), &*impl->memory,
                                             /*event_tracer=*/nullptr,
                                             /*named_data_map=*/nullptr, &backend_options);
    if (!loaded.ok()) {
      group.set_loading(nullptr);
      check_digests(state);
      throw Error(text("method '", impl->method_name, "' of '", state.path,
                       "' cannot be loaded: ", failure_text(loaded.error()), "."));
    }
    impl->method.emplace(std::move(loaded.get()));
    group.set_loading(nullptr);
  } catch (const FatalCheck&) {
    group.set_loading(nullptr);
    (void)impl.release();  // half made: freeing it may crash
    throw;
  }
}

// XNNPACK's weights cache keeps the file of packed weights locked for as long as it lives, and
// packs again, in memory, what another process has locked. The locks only guard the writing.
void release_locks(const std::string& path) {
  std::error_code code;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", code)) {
    const auto target = std::filesystem::read_symlink(entry.path(), code);
    if (!code && target == path) {
      flock(std::stoi(entry.path().filename().string()), LOCK_UN);
    }
  }
}

}  // namespace

Program::Program(const std::string& path, std::vector<uint64_t> digests)
    : impl_(std::make_shared<Impl>()) {
  init_runtime();
  register_operators();
  check_file(path);
  const LogScope log;
  ProgramState& state = *impl_->state;
  state.path = path;
  state.loader.emplace(path, std::move(digests));
  auto program = et::Program::load(&*state.loader, et::Program::Verification::InternalConsistency);
  check_digests(state);
  if (!program.ok()) {
    throw Error(text("program '", path, "' is damaged or truncated (",
                     failure_text(program.error()), "); compile it again."));
  }
  state.program.emplace(std::move(program.get()));
  for (size_t i = 0; i < state.program->num_methods(); ++i) {
    const std::string name = state.program->get_method_name(i).get();
    require(std::ranges::all_of(name, [](char c) { return c > 0x20 && c < 0x7f; }), "program '",
            path, "' is damaged: method ", i, " has an unprintable name; ", "compile it again.");
    state.method_names.push_back(name);
  }
}

Program::~Program() = default;

void Program::trim() const { impl_->state->loader->trim(); }

const std::string& Program::path() const { return impl_->state->path; }

const std::vector<std::string>& Program::method_names() const { return impl_->state->method_names; }

std::unique_ptr<Instance> Program::load(const std::string& method, int workspace_group,
                                        const std::string& packed_path) const {
  ProgramState& state = *impl_->state;
  const auto& names = state.method_names;
  require(std::ranges::find(names, method) != names.end(), "program '", state.path,
          "' has no method '", method, "'; it has ", names_text(names), ".");
  const LogScope log;
  auto impl = std::make_unique<Instance::Impl>();
  impl->program = impl_->state;
  impl->method_name = method;
  if (workspace_group < 0) {
    impl->group = std::make_shared<GroupAllocator>();
  } else {
    const std::lock_guard lock(impl_->groups_mutex);
    auto& group = impl_->groups[workspace_group];
    if (group == nullptr) {
      group = std::make_shared<GroupAllocator>();
      group->is_shared = true;
    }
    impl->group = group;
  }

  // Per load, not per process: another user of ExecuTorch in this process keeps its own options.
  et::BackendOptions<3> xnnpack_options;
  constexpr int kWorkspacePerModel = 1;
  et::LoadBackendOptionsMap backend_options;
  require(
      xnnpack_options.set_option("workspace_sharing_mode", kWorkspacePerModel) == et::Error::Ok &&
          xnnpack_options.set_option("weight_cache_enabled", !packed_path.empty()) ==
              et::Error::Ok &&
          (packed_path.empty() ||
           xnnpack_options.set_option("packed_cache_path", packed_path.c_str()) == et::Error::Ok) &&
          backend_options.set_options("XnnpackBackend", xnnpack_options.view()) == et::Error::Ok,
      "XNNPACK's options cannot be set; this build of ExecuTorch is not the one expected.");

  auto meta = state.program->method_meta(method.c_str());
  if (!meta.ok()) {
    throw Error(text("method '", method, "' of '", state.path,
                     "' cannot be read: ", failure_text(meta.error()), "."));
  }
  check_backends(*meta, state.path, method);
  plan_memory(*impl, *meta);
  impl->is_delegated = meta->uses_backend("XnnpackBackend");
  load_method(impl, backend_options);
  if (!packed_path.empty()) {
    release_locks(packed_path);
  }
  find_slots(*impl, *meta);
  return std::unique_ptr<Instance>(new Instance(std::move(impl)));
}

}  // namespace doubleweave

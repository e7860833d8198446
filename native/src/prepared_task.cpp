#include "prepared_task.h"

#include "doubleweave/error.h"
#include "instance_impl.h"

namespace doubleweave {
namespace {

// More than any cache row; keeps the arithmetic below from overflowing.
constexpr int64_t kMaxBytesPerToken = int64_t{1} << 30;

// Bytes of a tensor of these sizes, and how many more for each unit of `grow_dim`. The sizes are
// within the method's bounds, so that neither overflows.
std::pair<int64_t, int64_t> tensor_bytes(const TensorInfo& info, const std::vector<int32_t>& sizes,
                                         int32_t grow_dim) {
  auto total = static_cast<int64_t>(dtype_bytes(info.dtype));
  int64_t per_unit = total;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    total *= sizes[dim];
    per_unit *= static_cast<int32_t>(dim) == grow_dim ? 1 : sizes[dim];
  }
  return {total, grow_dim >= 0 ? per_unit : 0};
}

void lower(BaseLimit& limit, int64_t max_base, const std::string& reason) {
  if (max_base < limit.max_base) {
    limit = {max_base, reason};
  }
}

}  // namespace

PreparedTask::PreparedTask(const Task& task, const Instance::Impl& instance,
                           const std::vector<Region>& regions, const std::string& name,
                           BaseLimit& limit) {
  require(task.inputs.size() == instance.input_infos.size() &&
              task.outputs.size() == instance.output_infos.size(),
          name, " binds ", task.inputs.size(), " inputs and ", task.outputs.size(),
          " outputs, but its method has ", instance.input_infos.size(), " and ",
          instance.output_infos.size(), ".");
  for (size_t i = 0; i < task.inputs.size(); ++i) {
    instance.check_sizes("input", i, instance.input_infos, task.inputs[i].sizes);
    inputs_.push_back(
        resolve(task.inputs[i], instance.input_infos[i], regions, text(name, " input ", i), limit));
  }
  for (size_t i = 0; i < task.outputs.size(); ++i) {
    const Binding& binding = task.outputs[i];
    require(!binding.sizes.empty() || binding.grow_dim < 0, name, " output ", i,
            " grows but has no sizes.");
    if (!binding.sizes.empty()) {
      instance.check_sizes("output", i, instance.output_infos, binding.sizes);
    }
    outputs_.push_back(
        resolve(binding, instance.output_infos[i], regions, text(name, " output ", i), limit));
  }
}

PreparedTask::Address PreparedTask::resolve(const Binding& binding, const TensorInfo& info,
                                            const std::vector<Region>& regions,
                                            const std::string& name, BaseLimit& limit) {
  const auto rank = static_cast<int32_t>(binding.sizes.size());
  require(binding.buffer >= 0 && binding.buffer < static_cast<int32_t>(regions.size()), name,
          " names buffer ", binding.buffer, " of ", regions.size(), ".");
  const auto [region, region_bytes] = regions[binding.buffer];
  const auto available = static_cast<int64_t>(region_bytes);
  require(binding.offset >= 0 && binding.offset <= available && binding.offset_per_token >= 0 &&
              binding.offset_per_token <= kMaxBytesPerToken && binding.grow_dim >= -1 &&
              binding.grow_dim < rank,
          name, " lies at offset ", binding.offset, " + ", binding.offset_per_token,
          " a token and grows in dimension ", binding.grow_dim,
          ", which is out of range for a buffer of ", available, " bytes and sizes ",
          SizesText{binding.sizes}, ".");
  const auto [bytes, bytes_per_unit] =
      tensor_bytes(info, binding.sizes.empty() ? info.sizes : binding.sizes, binding.grow_dim);
  const int64_t spare = available - binding.offset - bytes;
  require(region != nullptr && spare >= 0, name, " needs ", bytes, " bytes at offset ",
          binding.offset, " of buffer ", binding.buffer, ", which has ",
          region == nullptr ? 0 : available, ".");
  const int64_t per_token = binding.offset_per_token + bytes_per_unit;
  if (per_token > 0) {
    lower(limit, spare / per_token, text(name, " to stay inside buffer ", binding.buffer));
  }
  Address address{binding.buffer,
                  binding.offset,
                  region_bytes - static_cast<size_t>(binding.offset),
                  binding.offset_per_token,
                  binding.sizes,
                  binding.grow_dim,
                  0};
  if (binding.grow_dim >= 0) {
    address.first_size = binding.sizes[binding.grow_dim];
    lower(limit, info.is_dynamic ? info.sizes[binding.grow_dim] - address.first_size : 0,
          text(name, " to keep to its method's sizes ", SizesText{info.sizes}));
  }
  return address;
}

void PreparedTask::bind(Instance::Impl& instance, int64_t base,
                        const std::vector<std::byte*>& starts) {
  const auto move_to_base = [base](Address& address) {
    if (address.grow_dim >= 0) {
      address.sizes[address.grow_dim] = address.first_size + static_cast<int32_t>(base);
    }
    return address.offset_per_token * base;
  };
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const int64_t offset = move_to_base(inputs_[i]);
    std::byte* const data = starts[inputs_[i].region] + inputs_[i].offset + offset;
    instance.bind_input(i, data, inputs_[i].sizes);
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const int64_t offset = move_to_base(outputs_[i]);
    std::byte* const data = starts[outputs_[i].region] + outputs_[i].offset + offset;
    instance.bind_output(i, data, outputs_[i].bytes - static_cast<size_t>(offset),
                         outputs_[i].sizes);
  }
}

}  // namespace doubleweave

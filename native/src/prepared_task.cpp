#include "prepared_task.h"

#include "doubleweave/error.h"
#include "instance_impl.h"

namespace doubleweave {
namespace {

// More than any cache row; keeps the arithmetic below from overflowing.
constexpr int64_t kMaxBytesPerToken = int64_t{1} << 30;
constexpr int32_t kMostRows = 1 << 16;

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
  require(task.num_rows >= 1 && task.num_rows <= kMostRows, name, " runs ", task.num_rows,
          " rows; expected 1 to ", kMostRows, ".");
  for (size_t i = 0; i < task.inputs.size(); ++i) {
    instance.check_sizes("input", i, instance.input_infos, task.inputs[i].sizes);
    inputs_.push_back(resolve(task.inputs[i], instance.input_infos[i], regions, task.num_rows,
                              text(name, " input ", i), limit));
  }
  for (size_t i = 0; i < task.outputs.size(); ++i) {
    const Binding& binding = task.outputs[i];
    require(!binding.sizes.empty() || binding.grow_dim < 0, name, " output ", i,
            " grows but has no sizes.");
    if (!binding.sizes.empty()) {
      instance.check_sizes("output", i, instance.output_infos, binding.sizes);
    }
    outputs_.push_back(resolve(binding, instance.output_infos[i], regions, task.num_rows,
                               text(name, " output ", i), limit));
  }
}

PreparedTask::Address PreparedTask::resolve(const Binding& binding, const TensorInfo& info,
                                            const std::vector<Region>& regions, int32_t num_rows,
                                            const std::string& name, BaseLimit& limit) {
  const auto rank = static_cast<int32_t>(binding.sizes.size());
  require(binding.buffer >= 0 && binding.buffer < static_cast<int32_t>(regions.size()), name,
          " names buffer ", binding.buffer, " of ", regions.size(), ".");
  const auto [region, region_bytes] = regions[binding.buffer];
  const auto available = static_cast<int64_t>(region_bytes);
  require(binding.offset >= 0 && binding.offset <= available && binding.offset_per_token >= 0 &&
              binding.offset_per_token <= kMaxBytesPerToken && binding.grow_dim >= -1 &&
              binding.grow_dim < rank && binding.offset_per_row >= 0 &&
              binding.offset_per_row <= kMaxBytesPerToken && binding.copy_bytes >= 0 &&
              binding.copy_bytes <= available &&
              (binding.first_copy == 0 || binding.first_copy == 1),
          name, " lies at offset ", binding.offset, " + ", binding.offset_per_token,
          " a token and grows in dimension ", binding.grow_dim,
          ", which is out of range for a buffer of ", available, " bytes and sizes ",
          SizesText{binding.sizes}, ".");
  const auto [bytes, bytes_per_unit] =
      tensor_bytes(info, binding.sizes.empty() ? info.sizes : binding.sizes, binding.grow_dim);
  // The last row, in the second copy.
  const int64_t furthest = binding.offset_per_row * (num_rows - 1) + binding.copy_bytes;
  const int64_t spare = available - binding.offset - furthest - bytes;
  require(region != nullptr && spare >= 0, name, " needs ", bytes, " bytes at offset ",
          binding.offset, " of buffer ", binding.buffer, ", which has ",
          region == nullptr ? 0 : available, ".");
  const int64_t per_token = binding.offset_per_token + bytes_per_unit;
  if (per_token > 0) {
    lower(limit, spare / per_token, text(name, " to stay inside buffer ", binding.buffer));
  }
  Address address{binding.buffer,
                  binding.offset,
                  region_bytes,
                  binding.offset_per_token,
                  binding.sizes,
                  binding.grow_dim,
                  0,
                  binding.offset_per_row,
                  binding.copy_bytes,
                  binding.first_copy};
  if (binding.grow_dim >= 0) {
    address.first_size = binding.sizes[binding.grow_dim];
    lower(limit, info.is_dynamic ? info.sizes[binding.grow_dim] - address.first_size : 0,
          text(name, " to keep to its method's sizes ", SizesText{info.sizes}));
  }
  return address;
}

int64_t PreparedTask::Address::offset_at(int64_t base, int32_t row) const {
  return offset + offset_per_token * base + offset_per_row * row +
         (first_copy + base + row) % 2 * copy_bytes;
}

void PreparedTask::bind(Instance::Impl& instance, int64_t base, int32_t row,
                        const std::vector<std::byte*>& starts) {
  const auto grow = [base](Address& address) {
    if (address.grow_dim >= 0) {
      address.sizes[address.grow_dim] = address.first_size + static_cast<int32_t>(base);
    }
  };
  for (size_t i = 0; i < inputs_.size(); ++i) {
    grow(inputs_[i]);
    std::byte* const data = starts[inputs_[i].region] + inputs_[i].offset_at(base, row);
    instance.bind_input(i, data, inputs_[i].sizes);
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    grow(outputs_[i]);
    const int64_t offset = outputs_[i].offset_at(base, row);
    std::byte* const data = starts[outputs_[i].region] + offset;
    instance.bind_output(i, data, outputs_[i].region_bytes - static_cast<size_t>(offset),
                         outputs_[i].sizes);
  }
}

}  // namespace doubleweave

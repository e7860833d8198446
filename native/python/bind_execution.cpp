#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "doubleweave/error.h"
#include "doubleweave/execution.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using ReboundPairs = std::vector<std::pair<int32_t, RegionHandle>>;
using Events = nb::ndarray<nb::numpy, int64_t, nb::shape<-1, 4>>;
using Rebound = std::variant<std::map<int32_t, RegionHandle>, ReboundPairs>;

std::vector<Instance*> pointers_of(const std::vector<std::shared_ptr<Instance>>& instances) {
  std::vector<Instance*> pointers;
  for (const auto& instance : instances) {
    require(instance != nullptr, "an execution's instances must not be None.");
    pointers.push_back(instance.get());
  }
  return pointers;
}

// An execution with what it uses, which it keeps alive.
class ExecutionHandle : public Execution {
 public:
  ExecutionHandle(std::vector<std::shared_ptr<Instance>> instances,
                  std::vector<RegionHandle> regions, const std::vector<Task>& tasks,
                  std::vector<std::vector<int32_t>> workers, int threads_per_worker)
      : Execution(pointers_of(instances), {regions.begin(), regions.end()}, tasks,
                  std::move(workers), threads_per_worker),
        instances_(std::move(instances)),
        regions_(std::move(regions)) {
    find_writers(tasks);
  }

  std::optional<Events> run(int64_t base, bool record, const Rebound& rebound) {
    // The handles in `rebound` keep the memory alive until the run has ended.
    const ReboundRegions memory = std::visit(
        [this](const auto& entries) {
          ReboundRegions result;
          for (const auto& [index, region] : entries) {
            check_writable(index, region);
            result.emplace_back(index, region);
          }
          return result;
        },
        rebound);
    auto timeline = record ? std::make_unique<Timeline>() : nullptr;
    const auto interrupted = [] {
      const nb::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    };
    try {
      const nb::gil_scoped_release release;
      Execution::run(base, timeline.get(), interrupted, memory);
    } catch (const Interrupted&) {
      if (PyErr_Occurred() != nullptr) {
        throw nb::python_error();  // what the signal's handler raised
      }
      throw;
    }
    if (!record) {
      return std::nullopt;
    }
    Timeline* const owned = timeline.release();
    const nb::capsule owner(owned,
                            [](void* pointer) noexcept { delete static_cast<Timeline*>(pointer); });
    static_assert(sizeof(Event) == 4 * sizeof(int64_t));
    return Events(owned->events.data(), {owned->events.size(), 4}, owner);
  }

 private:
  // Notes which regions are written, of checked tasks. Throws Error where one is read-only.
  void find_writers(const std::vector<Task>& tasks) {
    writers_.assign(regions_.size(), -1);
    for (size_t t = 0; t < tasks.size(); ++t) {
      for (const Binding& output : tasks[t].outputs) {
        writers_[output.buffer] = static_cast<int32_t>(t);
      }
      if (tasks[t].copy.has_value()) {
        writers_[tasks[t].copy->target] = static_cast<int32_t>(t);
      }
    }
    for (size_t r = 0; r < regions_.size(); ++r) {
      check_writable(static_cast<int32_t>(r), regions_[r]);
    }
  }

  // `region` takes the place `index`; an index out of range is the run's to refuse.
  void check_writable(int32_t index, const RegionHandle& region) const {
    if (!region.is_writable && index >= 0 && index < static_cast<int32_t>(writers_.size()) &&
        writers_[index] >= 0) {
      throw Error("region " + std::to_string(index) + " is read-only, but task " +
                  std::to_string(writers_[index]) +
                  " writes it; make it of a writable array, with writable=True.");
    }
  }

  std::vector<std::shared_ptr<Instance>> instances_;
  std::vector<RegionHandle> regions_;
  std::vector<int32_t> writers_;  // a task that writes the region, -1: none does
};

}  // namespace

void bind_execution(nb::module_& m) {
  nb::class_<Binding>(
      m, "Binding",
      "Where an input or output of a task lies, with `base` the tokens in the "
      "cache when a run starts: offset + offset_per_token * base bytes into the "
      "buffer; sizes[grow_dim] grows by base. Row r of a task lies offset_per_row * r "
      "further. A state has two copies, copy_bytes apart, of which the token at base "
      "+ r reads one and writes the other: first_copy, at base 0 and row 0.")
      .def(nb::init<int32_t, std::vector<int32_t>, int64_t, int64_t, int32_t, int64_t, int64_t,
                    int32_t>(),
           "buffer"_a, "sizes"_a = std::vector<int32_t>(), "offset"_a = 0, "offset_per_token"_a = 0,
           "grow_dim"_a = -1, "offset_per_row"_a = 0, "copy_bytes"_a = 0, "first_copy"_a = 0)
      .def_ro("buffer", &Binding::buffer)
      .def_ro("sizes", &Binding::sizes)
      .def_ro("offset", &Binding::offset)
      .def_ro("offset_per_token", &Binding::offset_per_token)
      .def_ro("grow_dim", &Binding::grow_dim)
      .def_ro("offset_per_row", &Binding::offset_per_row)
      .def_ro("copy_bytes", &Binding::copy_bytes)
      .def_ro("first_copy", &Binding::first_copy);

  nb::class_<BlockCopy>(m, "Copy",
                        "Blocks copied from one region to another: block i from source_offset + i "
                        "* source_stride to target_offset + i * target_stride, with `pad_bytes` "
                        "zeros behind it. All in bytes; no base moves it.")
      .def(nb::init<int32_t, int64_t, int64_t, int32_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t>(),
           nb::kw_only(), "source"_a, "source_offset"_a = 0, "source_stride"_a = 0, "target"_a,
           "target_offset"_a = 0, "target_stride"_a = 0, "num_blocks"_a = 1, "block_bytes"_a,
           "pad_bytes"_a = 0)
      .def_ro("source", &BlockCopy::source)
      .def_ro("source_offset", &BlockCopy::source_offset)
      .def_ro("source_stride", &BlockCopy::source_stride)
      .def_ro("target", &BlockCopy::target)
      .def_ro("target_offset", &BlockCopy::target_offset)
      .def_ro("target_stride", &BlockCopy::target_stride)
      .def_ro("num_blocks", &BlockCopy::num_blocks)
      .def_ro("block_bytes", &BlockCopy::block_bytes)
      .def_ro("pad_bytes", &BlockCopy::pad_bytes);

  nb::class_<Task>(m, "Task",
                   "One execution of an instance, or one for each of `num_rows` rows, or one copy, "
                   "after the tasks in `after`.")
      .def(
          "__init__",
          [](Task* task, int32_t instance, std::vector<Binding> inputs,
             std::vector<Binding> outputs, std::vector<int32_t> after, int32_t label,
             int32_t num_rows) {
            new (task)
                Task{instance,     std::move(inputs), std::move(outputs), std::move(after), label,
                     std::nullopt, num_rows};
          },
          "instance"_a, "inputs"_a, "outputs"_a, "after"_a = std::vector<int32_t>(), "label"_a = 0,
          "num_rows"_a = 1)
      .def_static(
          "of_copy",
          [](const BlockCopy& copy, std::vector<int32_t> after, int32_t label) {
            return Task{-1, {}, {}, std::move(after), label, copy};
          },
          "copy"_a, "after"_a = std::vector<int32_t>(), "label"_a = 0,
          "A task that runs no method; its `instance` is -1.")
      .def_ro("instance", &Task::instance)
      .def_ro("inputs", &Task::inputs)
      .def_ro("outputs", &Task::outputs)
      .def_ro("after", &Task::after)
      .def_ro("label", &Task::label)
      .def_ro("copy", &Task::copy)
      .def_ro("num_rows", &Task::num_rows);

  nb::class_<ExecutionHandle>(
      m, "Execution",
      "A prepared run: tasks, in an order for each worker; worker 0 is the calling thread.")
      .def(nb::init<std::vector<std::shared_ptr<Instance>>, std::vector<RegionHandle>,
                    std::vector<Task>, std::vector<std::vector<int32_t>>, int>(),
           "instances"_a, "regions"_a, "tasks"_a, "workers"_a, "threads_per_worker"_a = 1)
      .def_prop_ro("max_base", &ExecutionHandle::max_base)
      .def_prop_ro("num_tasks", &ExecutionHandle::num_tasks)
      .def_prop_ro("num_workers", &ExecutionHandle::num_workers)
      .def("num_finished", &ExecutionHandle::num_finished,
           "How many of its tasks each worker has finished, on any thread.")
      .def("run", &ExecutionHandle::run, "base"_a = 0, "record"_a = false,
           "rebound"_a = ReboundPairs(),
           "Run every task once, without the GIL; Ctrl-C stops it with KeyboardInterrupt.\n\nWith "
           "`record`, returns int64 [n, 4]: (task, worker, start ns, end ns), worker by worker. "
           "The regions `rebound` lie elsewhere for this run, each with at least the bytes of the "
           "one that it replaces.");
}

}  // namespace doubleweave::python

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "bindings.h"
#include "doubleweave/error.h"
#include "doubleweave/execution.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// An execution with what it uses, which it keeps alive.
class ExecutionHandle {
 public:
  ExecutionHandle(std::vector<std::shared_ptr<Instance>> instances,
                  std::vector<RegionHandle> regions, std::vector<Task> tasks,
                  std::vector<std::vector<int32_t>> workers, int threads_per_worker)
      : instances_(std::move(instances)), regions_(std::move(regions)) {
    std::vector<Instance*> instance_pointers;
    for (const auto& instance : instances_) {
      if (instance == nullptr) {
        throw Error("an execution's instances must not be None.");
      }
      instance_pointers.push_back(instance.get());
    }
    std::vector<Region> memory;
    for (const RegionHandle& region : regions_) {
      memory.emplace_back(region.data, region.bytes);
    }
    execution_.emplace(std::move(instance_pointers), std::move(memory), std::move(tasks),
                       std::move(workers), threads_per_worker);
  }

  const Execution& execution() const { return *execution_; }

  // Events as an int64 array [n, 4], or None.
  nb::object run(int64_t base, bool record) {
    auto timeline = record ? std::make_unique<Timeline>() : nullptr;
    const auto interrupted = [] {
      const nb::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    };
    try {
      const nb::gil_scoped_release release;
      execution_->run(base, timeline.get(), interrupted);
    } catch (const Interrupted&) {
      if (PyErr_Occurred() != nullptr) {
        throw nb::python_error();  // what the signal's handler raised
      }
      throw;
    }
    if (!record) {
      return nb::none();
    }
    Timeline* const owned = timeline.release();
    const nb::capsule owner(owned,
                            [](void* pointer) noexcept { delete static_cast<Timeline*>(pointer); });
    static_assert(sizeof(Event) == 4 * sizeof(int64_t));
    return nb::cast(nb::ndarray<nb::numpy, int64_t, nb::shape<-1, 4>>(
                        owned->events.data(), {owned->events.size(), 4}, owner),
                    nb::rv_policy::reference);
  }

 private:
  std::vector<std::shared_ptr<Instance>> instances_;
  std::vector<RegionHandle> regions_;
  std::optional<Execution> execution_;
};

}  // namespace

void bind_execution(nb::module_& m) {
  nb::class_<Binding>(m, "Binding",
                      "Where an input or output of a task lies; see doubleweave/execution.h.")
      .def(
          "__init__",
          [](Binding* self, int32_t buffer, std::vector<int32_t> sizes, int64_t offset,
             int64_t offset_per_token, int32_t grow_dim) {
            new (self) Binding{buffer, offset, offset_per_token, std::move(sizes), grow_dim};
          },
          "buffer"_a, "sizes"_a = std::vector<int32_t>(), "offset"_a = 0, "offset_per_token"_a = 0,
          "grow_dim"_a = -1)
      .def_ro("buffer", &Binding::buffer)
      .def_ro("sizes", &Binding::sizes)
      .def_ro("offset", &Binding::offset)
      .def_ro("offset_per_token", &Binding::offset_per_token)
      .def_ro("grow_dim", &Binding::grow_dim);

  nb::class_<Task>(m, "Task", "One execution of an instance.")
      .def(
          "__init__",
          [](Task* self, int32_t instance, std::vector<Binding> inputs,
             std::vector<Binding> outputs, std::vector<int32_t> after, int32_t label) {
            new (self)
                Task{instance, std::move(inputs), std::move(outputs), std::move(after), label};
          },
          "instance"_a, "inputs"_a, "outputs"_a, "after"_a = std::vector<int32_t>(), "label"_a = 0)
      .def_ro("instance", &Task::instance)
      .def_ro("inputs", &Task::inputs)
      .def_ro("outputs", &Task::outputs)
      .def_ro("after", &Task::after)
      .def_ro("label", &Task::label);

  nb::class_<ExecutionHandle>(m, "Execution", "A prepared run: tasks, in an order for each worker.")
      .def(nb::init<std::vector<std::shared_ptr<Instance>>, std::vector<RegionHandle>,
                    std::vector<Task>, std::vector<std::vector<int32_t>>, int>(),
           "instances"_a, "regions"_a, "tasks"_a, "workers"_a, "threads_per_worker"_a = 1)
      .def_prop_ro("max_base",
                   [](const ExecutionHandle& self) { return self.execution().max_base(); })
      .def_prop_ro("num_tasks",
                   [](const ExecutionHandle& self) { return self.execution().num_tasks(); })
      .def_prop_ro("num_workers",
                   [](const ExecutionHandle& self) { return self.execution().num_workers(); })
      .def("run", &ExecutionHandle::run, "base"_a = 0, "record"_a = false,
           "Run every task once; with `record`, give an int64 array [n, 4] of (task, worker, start "
           "ns, end ns).");
}

}  // namespace doubleweave::python

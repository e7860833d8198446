// The parts of the module, one function per file.
#pragma once

#include <nanobind/nanobind.h>

#include "doubleweave/execution.h"

namespace doubleweave::python {

/// Memory that tasks read and write, with what keeps it alive.
struct RegionHandle {
  operator Region() const { return {data, bytes}; }

  void* data;
  size_t bytes;
  std::shared_ptr<void> owner;
  bool is_writable = true;
};

void bind_memory(nanobind::module_& m);     // KvCache, Buffers, Region
void bind_execution(nanobind::module_& m);  // Binding, Copy, Task, Execution
void bind_kernels(nanobind::module_& m);    // attention, rotary
void bind_turns(nanobind::module_& m);      // Turn, Turns
void bind_packed(nanobind::module_& m);     // PackedWeights

}  // namespace doubleweave::python

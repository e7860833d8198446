// The Python module `doubleweave._scheduling`: predicting needs it alone, without ExecuTorch.
#include <nanobind/stl/string.h>

#include <exception>

#include "arrays.h"
#include "doubleweave/digest.h"
#include "doubleweave/scheduling/schedule.h"

namespace nb = nanobind;

NB_MODULE(_scheduling, m) {
  m.doc() = "From a prompt to a schedule; see native/include/doubleweave/scheduling.";
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    const auto raise = [](const char* name, const std::exception& error) {
      const nb::object type = nb::module_::import_("doubleweave.errors").attr(name);
      PyErr_SetString(type.ptr(), error.what());
    };
    try {
      std::rethrow_exception(pointer);
    } catch (const doubleweave::scheduling::InputError& error) {
      raise("InputError", error);
    } catch (const doubleweave::scheduling::ScheduleError& error) {
      raise("ScheduleError", error);
    }
  });
  m.def(
      "digest",
      [](const nb::bytes& data) { return doubleweave::digest_text({data.c_str(), data.size()}); },
      nb::arg("data"), "XXH64 of the data as 16 hexadecimal digits; finds damage to files.");
  m.attr("DIGEST_CHUNK_BYTES") = doubleweave::kDigestChunkBytes;
  doubleweave::python::bind_graph(m);
  doubleweave::python::bind_planner(m);
}

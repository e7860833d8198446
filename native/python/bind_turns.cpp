#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>

#include "bindings.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Names = std::vector<std::string>;  // sorted

// Who uses which names and who waits for them, in the order in which they came. The first of those
// that share a name has it.
class Line {
 public:
  using Place = std::list<Names>::iterator;

  Place join(Names names) {
    const std::lock_guard lock(mutex_);
    return places_.insert(places_.end(), std::move(names));
  }

  // Whether it is the turn of `place`, after waiting for `period` at most.
  bool wait_for(Place place, std::chrono::milliseconds period) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, period, [&] {
      return std::none_of(places_.begin(), place,
                          [&](const Names& earlier) { return have_common(earlier, *place); });
    });
  }

  void leave(Place place) {
    const std::lock_guard lock(mutex_);
    places_.erase(place);
    changed_.notify_all();
  }

 private:
  static bool have_common(const Names& a, const Names& b) {
    return std::ranges::any_of(
        a, [&](const std::string& name) { return std::ranges::binary_search(b, name); });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Names> places_;
};

// A place in a line; destroying it leaves the line. So a turn ends also where what a signal's
// handler raises comes between two steps of Python: as taking it returns, or before a `with` ends.
class Turn {
 public:
  Turn(std::shared_ptr<Line> line, Names names)
      : line_(std::move(line)), place_(line_->join(std::move(names))) {}
  ~Turn() { end(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  void wait() {
    constexpr std::chrono::milliseconds kInterruptPeriod(30);
    for (bool is_mine = line_->wait_for(place_, std::chrono::milliseconds(0)); !is_mine;) {
      {
        const nb::gil_scoped_release release;
        is_mine = line_->wait_for(place_, kInterruptPeriod);
      }
      if (PyErr_CheckSignals() != 0) {
        throw nb::python_error();
      }
    }
  }

  void end() {
    if (line_ != nullptr) {
      line_->leave(place_);
      line_ = nullptr;
    }
  }

 private:
  std::shared_ptr<Line> line_;
  Line::Place place_;
};

}  // namespace

void bind_turns(nb::module_& m) {
  nb::class_<Turn>(m, "Turn",
                   "Names in use until it ends, at the latest when nothing refers to it.")
      .def("__enter__", [](nb::handle_t<Turn> self) { return self; })
      .def(
          "__exit__", [](Turn& self, nb::handle, nb::handle, nb::handle) { self.end(); },
          "type"_a.none(), "value"_a.none(), "traceback"_a.none());

  nb::class_<Line>(m, "Turns", "Names that are used by one at a time, in the order asked for.")
      .def(nb::init<>())
      .def(
          "take",
          [](std::shared_ptr<Line> self, Names names) {
            std::ranges::sort(names);
            auto turn = std::make_unique<Turn>(std::move(self), std::move(names));
            turn->wait();
            return turn;
          },
          "names"_a,
          "Wait, without the GIL, until nobody who came before uses any of the names; what a "
          "signal's handler raises ends the wait.");
}

}  // namespace doubleweave::python

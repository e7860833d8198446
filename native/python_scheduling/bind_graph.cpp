#include <algorithm>
#include <stdexcept>

#include "arrays.h"
#include "convert.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;
using namespace scheduling;

namespace {

using Rows = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

std::vector<Wait> waits_of(const Rows& rows, size_t tasks, size_t same, size_t before) {
  std::vector<Wait> waits;
  for (size_t i = 0; i < rows.shape(0); ++i) {
    const Wait wait{static_cast<int>(rows(i, 0)), static_cast<int>(rows(i, 1)),
                    static_cast<int>(rows(i, 2))};
    const size_t others = wait.chunks == 0 ? same : before;
    if (wait.task < 0 || static_cast<size_t>(wait.task) >= tasks || wait.other < 0 ||
        static_cast<size_t>(wait.other) >= others || wait.chunks > kLaneBefore) {
      throw std::invalid_argument("a wait names a place that does not exist");
    }
    waits.push_back(wait);
  }
  return waits;
}

// A graph's tasks and their memory.
struct OwnedTasks {
  OwnedTasks(const Array<int32_t>& calls, const Array<int32_t>& chunks,
             const Array<int32_t>& starts, const Array<int32_t>& waits,
             const Array<int32_t>& places, std::vector<std::string> names)
      : call_of(vector_of(calls)),
        chunk_of(vector_of(chunks)),
        after_starts(vector_of(starts)),
        after(vector_of(waits)),
        device(vector_of(places)),
        devices(std::move(names)) {
    const size_t count = call_of.size();
    const auto has_device = [&](int32_t place) {
      return place >= 0 && static_cast<size_t>(place) < devices.size();
    };
    if (chunk_of.size() != count || device.size() != count || after_starts.size() != count + 1 ||
        !std::ranges::all_of(device, has_device)) {
      throw std::invalid_argument("the arrays of a task graph do not fit each other");
    }
  }

  std::vector<int32_t> call_of, chunk_of, after_starts, after, device;
  std::vector<std::string> devices;

  Tasks view() const { return {call_of, chunk_of, after_starts, after, device, devices}; }
};

void check_fit(const OwnedTasks& tasks, const Costs& costs) {
  const size_t pairs = tasks.devices.size() * tasks.devices.size();
  if (costs.duration_ns.size() != tasks.call_of.size() ||
      (!costs.repeated.empty() && costs.repeated.size() != tasks.call_of.size()) ||
      costs.hand_over_ns.size() != pairs || costs.contention.size() != pairs) {
    throw std::invalid_argument("the costs are not of this task graph");
  }
}

}  // namespace

void bind_graph(nb::module_& m) {
  m.def("schedules", [] { return std::vector<std::string>(kSchedules.begin(), kSchedules.end()); });
  m.def(
      "cut",
      [](int num_tokens, std::vector<int> fixed, int most, int num_workers, int limit) {
        return cut(num_tokens, {std::move(fixed), most}, num_workers, limit);
      },
      "num_tokens"_a, "fixed"_a, "most"_a, "num_workers"_a, "limit"_a);
  m.def(
      "default_choice",
      [](const std::string& schedule, const std::optional<std::vector<std::string>>& workers,
         std::optional<int> chunk, int threads, const std::vector<std::string>& devices,
         int most_rows) {
        return default_choice(to_wish(schedule, workers, chunk, threads), devices, most_rows);
      },
      "schedule"_a, "workers"_a.none(), "chunk"_a.none(), "threads"_a, "devices"_a, "most_rows"_a);
  m.def("num_abreast", &num_abreast, "choice"_a, "static_device"_a, "chunks"_a);

  nb::class_<Pattern>(m, "Pattern")
      .def(
          "__init__",
          [](Pattern* self, const Array<int32_t>& body, const Array<int32_t>& last,
             const Rows& body_waits, const Rows& last_waits) {
            new (self) Pattern{vector_of(body), vector_of(last),
                               waits_of(body_waits, body.size(), body.size(), body.size()),
                               waits_of(last_waits, last.size(), last.size(), body.size())};
          },
          "body"_a, "last"_a, "body_waits"_a, "last_waits"_a);
  nb::class_<Scratch>(m, "Scratch")
      .def(nb::init<std::vector<int32_t>, int>(), "blocks"_a, "groups"_a);
  m.def(
      "repeat",
      [](const Pattern& pattern, const Scratch& scratch, std::vector<Chunk> chunks, int in_flight,
         int abreast) {
        TaskGraph graph = repeat(pattern, scratch, std::move(chunks), in_flight, abreast);
        return std::tuple(to_numpy(std::move(graph.call_of)), to_numpy(std::move(graph.chunk_of)),
                          to_numpy(std::move(graph.after_starts)), to_numpy(std::move(graph.after)),
                          graph.lanes);
      },
      "pattern"_a, "scratch"_a, "chunks"_a, "in_flight"_a, "abreast"_a);

  nb::class_<OwnedTasks>(m, "Tasks")
      .def(nb::init<const Array<int32_t>&, const Array<int32_t>&, const Array<int32_t>&,
                    const Array<int32_t>&, const Array<int32_t>&, std::vector<std::string>>(),
           "call_of"_a, "chunk_of"_a, "after_starts"_a, "after"_a, "device"_a, "devices"_a);
  nb::class_<Costs>(m, "Costs")
      .def(
          "__init__",
          [](Costs* self, const Array<int64_t>& duration_ns,
             const std::optional<Array<double>>& repeated, const Array<int64_t>& hand_over_ns,
             int64_t same_worker_ns, const Array<double>& contention) {
            new (self) Costs{vector_of(duration_ns),
                             repeated ? vector_of(*repeated) : std::vector<double>{},
                             vector_of(hand_over_ns), same_worker_ns, vector_of(contention)};
          },
          "duration_ns"_a, "repeated"_a.none(), "hand_over_ns"_a, "same_worker_ns"_a,
          "contention"_a);
  m.def(
      "make_schedule",
      [](const std::string& name, const OwnedTasks& tasks, const std::vector<std::string>& workers,
         const Costs& costs) {
        check_fit(tasks, costs);
        Schedule made = make_schedule(name, tasks.view(), workers, costs);
        return std::tuple(std::move(made.workers), std::move(made.lists));
      },
      "name"_a, "tasks"_a, "workers"_a, "costs"_a);
  m.def(
      "times",
      [](const std::vector<std::string>& workers, Lists lists, const OwnedTasks& tasks,
         const Costs& costs) {
        check_fit(tasks, costs);
        Times found = times_of({workers, std::move(lists)}, tasks.view(), costs);
        return std::tuple(to_numpy(std::move(found.start_ns)), to_numpy(std::move(found.end_ns)));
      },
      "workers"_a, "lists"_a, "tasks"_a, "costs"_a);
  m.def(
      "without_barriers",
      [](const Lists& lists, const Array<int32_t>& after_starts, const Array<int32_t>& after) {
        Ordered found = without_barriers(lists, span_of(after_starts), span_of(after));
        return std::tuple(std::move(found.lists), to_numpy(std::move(found.after_starts)),
                          to_numpy(std::move(found.after)));
      },
      "lists"_a, "after_starts"_a, "after"_a);
  m.def(
      "path_to_end",
      [](const Array<int64_t>& duration_ns, const Array<int32_t>& after_starts,
         const Array<int32_t>& after) {
        return to_numpy(path_to_end({span_of(duration_ns), span_of(after_starts), span_of(after)}));
      },
      "duration_ns"_a, "after_starts"_a, "after"_a);
}

}  // namespace doubleweave::python

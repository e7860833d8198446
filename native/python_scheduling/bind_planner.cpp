#include "arrays.h"
#include "convert.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;
using namespace scheduling;

namespace {

void bind_times(nb::module_& m) {
  nb::class_<MeasuredTimes>(m, "MeasuredTimes")
      .def(nb::init<int, std::vector<double>, std::vector<double>, std::vector<std::vector<double>>,
                    std::vector<double>>(),
           "threads"_a, "rows"_a, "cached"_a, "us"_a, "repeated"_a);
  nb::class_<EstimatedTimes>(m, "EstimatedTimes")
      .def(nb::init<double, int, double, double, double, double, double, double, double, double,
                    std::vector<std::pair<double, double>>>(),
           nb::kw_only(), "launch_us"_a, "cores"_a, "row_us"_a, "square_us"_a, "key_us"_a,
           "call_bytes_us"_a, "row_bytes_us"_a, "cached_bytes_us"_a, "expert_bytes_us"_a,
           "expert_share"_a, "counted_us"_a);
  nb::class_<SegmentTimes>(m, "SegmentTimes")
      .def(
          "__init__",
          [](SegmentTimes* self, std::vector<MeasuredTimes> measured,
             const std::optional<EstimatedTimes>& estimated) {
            new (self) SegmentTimes{std::move(measured), estimated.value_or(EstimatedTimes{})};
          },
          "measured"_a, "estimated"_a.none());
  m.def(
      "time_us",
      [](const SegmentTimes& times, const Array<double>& rows, const Array<double>& cached,
         int threads) {
        std::vector<double> found;
        for (size_t i = 0; i < rows.size(); ++i) {
          found.push_back(time_us(times, rows(i), cached(i), threads));
        }
        return to_numpy(std::move(found));
      },
      "times"_a, "rows"_a, "cached"_a, "threads"_a);
  nb::class_<CostTables>(m, "CostTables")
      .def(nb::init<std::vector<SegmentTimes>, std::vector<std::vector<int64_t>>, int64_t,
                    std::vector<ContentionTable>>(),
           "segments"_a, "hand_over_ns"_a, "same_worker_ns"_a, "contention"_a);
  m.def(
      "costs_of",
      [](const CostTables& tables, const std::vector<CallCosts>& calls, std::vector<Chunk> chunks,
         const Array<int32_t>& call_of, const Array<int32_t>& chunk_of, int threads,
         int num_workers, bool all_rows, int cached) {
        TaskGraph graph;
        graph.chunks = std::move(chunks);
        graph.call_of = vector_of(call_of);
        graph.chunk_of = vector_of(chunk_of);
        Costs costs = costs_of(tables, calls, graph, threads, num_workers, all_rows, cached);
        return std::tuple(to_numpy(std::move(costs.duration_ns)),
                          to_numpy(std::move(costs.repeated)),
                          to_numpy(std::move(costs.hand_over_ns)), costs.same_worker_ns,
                          to_numpy(std::move(costs.contention)));
      },
      "tables"_a, "calls"_a, "chunks"_a, "call_of"_a, "chunk_of"_a, "threads"_a, "num_workers"_a,
      "all_rows"_a, "cached"_a);
}

}  // namespace

void bind_planner(nb::module_& m) {
  bind_times(m);
  nb::class_<Outline>(m, "Outline")
      .def(
          "__init__",
          [](Outline* self, std::vector<int> sizes, int most_rows, std::vector<std::string> devices,
             std::string static_device, std::vector<CallCosts> calls, const Pattern& pattern,
             const Scratch& scratch, int max_tokens) {
            new (self) Outline{{std::move(sizes), most_rows},
                               std::move(devices),
                               std::move(static_device),
                               std::move(calls),
                               pattern,
                               scratch,
                               max_tokens};
          },
          nb::kw_only(), "sizes"_a, "most_rows"_a, "devices"_a, "static_device"_a, "calls"_a,
          "pattern"_a, "scratch"_a, "max_tokens"_a);
  nb::class_<Machine>(m, "Machine")
      .def(nb::init<CostTables, std::vector<int>, std::string, int, std::vector<Decision>>(),
           nb::kw_only(), "costs"_a, "most_tasks"_a, "overlapping"_a, "threads"_a, "decisions"_a);
  nb::class_<Planner>(m, "Planner")
      .def(nb::init<Outline, Machine>(), "outline"_a, "machine"_a)
      .def("default_threads", &Planner::default_threads, "cores"_a, "most"_a)
      .def(
          "choose",
          [](Planner& self, int num_tokens, const std::string& schedule, int threads,
             const std::optional<std::vector<std::string>>& workers, std::optional<int> chunk) {
            return self.choose(to_wish(schedule, workers, chunk, threads), num_tokens);
          },
          "num_tokens"_a, "schedule"_a, "threads"_a, "workers"_a.none(), "chunk"_a.none())
      .def(
          "check",
          [](const Planner& self, const std::string& schedule, int threads,
             const std::optional<std::vector<std::string>>& workers, std::optional<int> chunk) {
            check_wish(to_wish(schedule, workers, chunk, threads), self.outline().devices);
          },
          "schedule"_a, "threads"_a, "workers"_a.none(), "chunk"_a.none())
      .def("settled", &Planner::settled, "choice"_a, "threads"_a, "num_tokens"_a)
      .def("candidates", &Planner::candidates, "num_tokens"_a, "threads"_a)
      .def("best", &Planner::best, "num_tokens"_a, "threads"_a);
  m.def("lengths_up_to", &lengths_up_to, "most"_a);
}

}  // namespace doubleweave::python

#include "arrays.h"
#include "convert.h"

namespace doubleweave::python {

namespace nb = nanobind;
using namespace nb::literals;
using namespace scheduling;

namespace {

using CallTuple = std::tuple<int, int, bool, bool>;

std::vector<CallCosts> to_calls(const std::vector<CallTuple>& tuples) {
  std::vector<CallCosts> calls;
  for (const auto& [segment, device, is_static, last_row] : tuples) {
    calls.push_back({segment, device, is_static, last_row});
  }
  return calls;
}

void bind_times(nb::module_& m) {
  nb::class_<MeasuredTimes>(m, "MeasuredTimes")
      .def(
          "__init__",
          [](MeasuredTimes* self, int threads, std::vector<double> rows, std::vector<double> cached,
             std::vector<std::vector<double>> us, std::vector<double> repeated) {
            new (self) MeasuredTimes{threads, std::move(rows), std::move(cached), std::move(us),
                                     std::move(repeated)};
          },
          "threads"_a, "rows"_a, "cached"_a, "us"_a, "repeated"_a);
  nb::class_<EstimatedTimes>(m, "EstimatedTimes")
      .def(
          "__init__",
          [](EstimatedTimes* self, double launch_us, int cores, double row_us, double square_us,
             double key_us, double call_bytes_us, double row_bytes_us, double cached_bytes_us,
             std::vector<std::pair<double, double>> counted_us) {
            new (self) EstimatedTimes{launch_us,    cores,           row_us,
                                      square_us,    key_us,          call_bytes_us,
                                      row_bytes_us, cached_bytes_us, std::move(counted_us)};
          },
          nb::kw_only(), "launch_us"_a, "cores"_a, "row_us"_a, "square_us"_a, "key_us"_a,
          "call_bytes_us"_a, "row_bytes_us"_a, "cached_bytes_us"_a, "counted_us"_a);
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
      .def(
          "__init__",
          [](CostTables* self, std::vector<SegmentTimes> segments,
             std::vector<std::vector<int64_t>> hand_over_ns, int64_t same_worker_ns,
             const std::vector<std::pair<int, std::vector<std::vector<double>>>>& contention) {
            new (self) CostTables{std::move(segments), std::move(hand_over_ns), same_worker_ns, {}};
            for (const auto& [workers, shares] : contention) {
              self->contention.push_back({workers, shares});
            }
          },
          "segments"_a, "hand_over_ns"_a, "same_worker_ns"_a, "contention"_a);
  m.def(
      "costs_of",
      [](const CostTables& tables, const std::vector<CallTuple>& calls,
         const std::vector<ChunkTuple>& chunks, const Array<int32_t>& call_of,
         const Array<int32_t>& chunk_of, int threads, int num_workers, bool all_rows, int cached) {
        TaskGraph graph;
        graph.chunks = to_chunks(chunks);
        graph.call_of = vector_of(call_of);
        graph.chunk_of = vector_of(chunk_of);
        Costs costs =
            costs_of(tables, to_calls(calls), graph, threads, num_workers, all_rows, cached);
        return nb::make_tuple(to_numpy(std::move(costs.duration_ns)),
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
             std::string static_device, const std::vector<CallTuple>& calls, const Pattern& pattern,
             const Scratch& scratch, int max_tokens) {
            new (self) Outline{{std::move(sizes), most_rows},
                               std::move(devices),
                               std::move(static_device),
                               to_calls(calls),
                               pattern,
                               scratch,
                               max_tokens};
          },
          nb::kw_only(), "sizes"_a, "most_rows"_a, "devices"_a, "static_device"_a, "calls"_a,
          "pattern"_a, "scratch"_a, "max_tokens"_a);
  nb::class_<Machine>(m, "Machine")
      .def(
          "__init__",
          [](Machine* self, const CostTables& costs, std::vector<int> most_tasks,
             std::string overlapping, int threads,
             const std::vector<std::pair<int, ChoiceTuple>>& decisions) {
            new (self) Machine{costs, std::move(most_tasks), std::move(overlapping), threads, {}};
            for (const auto& [tokens, choice] : decisions) {
              self->decisions.push_back({tokens, to_choice(choice)});
            }
          },
          nb::kw_only(), "costs"_a, "most_tasks"_a, "overlapping"_a, "threads"_a, "decisions"_a);
  nb::class_<Planner>(m, "Planner")
      .def("__init__", [](Planner* self, const Outline& outline,
                          const Machine& machine) { new (self) Planner(outline, machine); })
      .def("default_threads", &Planner::default_threads, "cores"_a, "most"_a)
      .def(
          "choose",
          [](Planner& self, int num_tokens, const std::string& schedule, int threads,
             const std::optional<std::vector<std::string>>& workers, std::optional<int> chunk) {
            return to_tuple(self.choose(to_wish(schedule, workers, chunk, threads), num_tokens));
          },
          "num_tokens"_a, "schedule"_a, "threads"_a, "workers"_a.none(), "chunk"_a.none())
      .def(
          "check",
          [](const Planner& self, const std::string& schedule, int threads,
             const std::optional<std::vector<std::string>>& workers, std::optional<int> chunk) {
            check_wish(to_wish(schedule, workers, chunk, threads), self.outline().devices);
          },
          "schedule"_a, "threads"_a, "workers"_a.none(), "chunk"_a.none())
      .def(
          "settled",
          [](const Planner& self, const ChoiceTuple& choice, int threads, int num_tokens) {
            return to_tuple(self.settled(to_choice(choice), threads, num_tokens));
          },
          "choice"_a, "threads"_a, "num_tokens"_a)
      .def(
          "candidates",
          [](const Planner& self, int num_tokens, int threads) {
            std::vector<ChoiceTuple> found;
            for (const Choice& choice : self.candidates(num_tokens, threads)) {
              found.push_back(to_tuple(choice));
            }
            return found;
          },
          "num_tokens"_a, "threads"_a)
      .def(
          "best",
          [](const Planner& self, int num_tokens, int threads) {
            return to_tuple(self.best(num_tokens, threads));
          },
          "num_tokens"_a, "threads"_a);
  m.def("lengths_up_to", &lengths_up_to, "most"_a);
}

}  // namespace doubleweave::python

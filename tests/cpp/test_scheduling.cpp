// Checks the engine that plans runs: chunks, choices, task graphs, costs, schedules, and the
// planner over a program of two layers whose numbers are small enough to work out by hand.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "doubleweave/scheduling/planner.h"

namespace dw = doubleweave::scheduling;

namespace {

bool ends_are(const std::vector<dw::Chunk>& chunks, const std::vector<dw::Chunk>& expected) {
  return chunks == expected;
}

void test_chunks() {
  const dw::RowSizes any{{}, 128};
  CHECK(ends_are(dw::cut(300, any, 1, 128), {{0, 100, 100}, {100, 100, 100}, {200, 100, 100}}),
        "equal chunks");
  CHECK(dw::cut(300, any, 2, 128).size() == 4, "as many as two workers share evenly");
  CHECK(dw::cut(40, any, 2, 128).size() == 1, "chunks below 32 rows do not pay");
  CHECK(dw::cut(300, any, 1, 50).size() == 6, "of at most 50 tokens");
  const dw::RowSizes fixed{{128, 1, 32}, 128};
  CHECK(ends_are(dw::cut(33, fixed, 1, 128), {{0, 32, 32}, {32, 1, 1}}), "a token of its own");
  CHECK(ends_are(dw::cut(30, fixed, 1, 128), {{0, 30, 32}}), "padding is cheaper than calls");
  CHECK(ends_are(dw::cut(3, {{32, 128}, 128}, 1, 8), {{0, 3, 32}}), "the smallest is allowed");
  CHECK(dw::cut(128 * 50 + 5, fixed, 1, 128).front().compiled_size == 128, "a long prompt");
}

void test_choices() {
  const std::vector<std::string> devices{"npu", "cpu"};
  const dw::Choice wave = dw::default_choice({"wavefront", {}, {}, 3}, devices, 128);
  CHECK(wave == (dw::Choice{"wavefront", {"any", "any", "any"}, 1, 128, 6, 3}), "a wavefront");
  const dw::Choice apart = dw::default_choice({"pipelined", {}, 32, 4}, devices, 128);
  CHECK(apart.workers == (std::vector<std::string>{"npu", "cpu", "cpu", "cpu"}), "one a device");
  CHECK(apart.chunk == 32 && apart.threads == 1 && apart.in_flight == 8, "as asked");
  CHECK(dw::default_choice({"sequential", {}, {}, 4}, devices, 128).threads == 4, "all threads");
  CHECK_REFUSED(dw::default_choice({"fast", {}, {}, 1}, devices, 8), "found 'fast', expected one");
  CHECK_REFUSED(dw::default_choice({"auto", {}, {}, 1}, devices, 8), "found 'auto', expected one");
  CHECK_REFUSED(dw::check_wish({"lockstep", {"gpu"}, {}, 1}, devices), "expected npu, cpu or any");
  CHECK_REFUSED(dw::check_wish({"auto", {}, 8, 1}, devices), "chunk: found 8 with schedule auto");
  CHECK_REFUSED(dw::check_wish({"lockstep", {}, 0, 1}, devices), "chunk: found 0");
  CHECK_REFUSED(dw::check_wish({"lockstep", {}, {}, 0}, devices), "threads: found 0");
}

// Calls 0 (block), 1 (attention), 2 (block), 3 (head, the last chunk's alone). A block's slot is
// written again by the chunk that takes its lane over.
dw::Pattern pattern() {
  return {{0, 1, 2},
          {0, 1, 2, 3},
          {{0, 0, -1}, {1, 0, 0}, {2, 1, 0}, {0, 1, dw::kLaneBefore}},
          {{0, 0, -1}, {1, 0, 0}, {2, 1, 0}, {0, 1, dw::kLaneBefore}, {3, 2, 0}}};
}

std::vector<int32_t> waits(const dw::TaskGraph& graph, int32_t task) {
  const auto begin = graph.after.begin();
  return {begin + graph.after_starts[static_cast<size_t>(task)],
          begin + graph.after_starts[static_cast<size_t>(task) + 1]};
}

void test_task_graphs() {
  const std::vector<dw::Chunk> chunks{{0, 8, 8}, {8, 8, 8}, {16, 8, 8}};
  const dw::TaskGraph graph = dw::repeat(pattern(), {}, chunks, 2, 1);
  CHECK(graph.size() == 10 && graph.lanes == 2, "found %zu", graph.size());
  CHECK(graph.call_of == (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 0, 1, 2, 3}), "calls");
  CHECK(graph.chunk_of.back() == 2, "chunks");
  CHECK(waits(graph, 0).empty(), "nothing before the first chunk");
  CHECK(waits(graph, 3) == std::vector<int32_t>{0}, "the block of the chunk before");
  CHECK(waits(graph, 6) == (std::vector<int32_t>{1, 3}), "and the lane's readers");
  CHECK(waits(graph, 9) == std::vector<int32_t>{8}, "the head");
  const dw::TaskGraph one = dw::repeat(pattern(), {}, {{0, 8, 8}}, 8, 1);
  CHECK(one.size() == 4 && one.lanes == 1, "a single chunk is the last");
}

void test_chunks_abreast_keep_close() {
  // Four blocks in a row that share two groups of scratch memory.
  dw::Pattern blocks{{0, 1, 2, 3}, {0, 1, 2, 3}, {}, {}};
  for (int call = 1; call < 4; ++call) {
    blocks.body_waits.push_back({call, call - 1, 0});
    blocks.last_waits.push_back({call, call - 1, 0});
  }
  const std::vector<dw::Chunk> chunks{{0, 8, 8}, {8, 8, 8}, {16, 8, 8}, {24, 8, 8}};
  const dw::Scratch scratch{{0, 1, 2, 3}, 4};
  const dw::TaskGraph graph = dw::repeat(blocks, scratch, chunks, 4, 2);
  // Chunk 0's block 3 waits for block 0 of chunk 1; chunk 2 starts behind chunk 1's block 1.
  CHECK(waits(graph, 3) == (std::vector<int32_t>{2, 4}), "within a round");
  CHECK(waits(graph, 8) == std::vector<int32_t>{5}, "behind the round before");
  CHECK(dw::num_abreast({"", {"any", "any"}, 1, 8, 1, 1}, "npu", 9) == 2, "workers of any device");
  CHECK(dw::num_abreast({"", {"npu", "cpu"}, 1, 8, 1, 1}, "npu", 9) == 1, "the static device's");
}

void test_times_of_a_segment() {
  dw::SegmentTimes measured;
  measured.measured.push_back({1, {10, 20}, {0, 100}, {{1, 3}, {2, 8}}, {1.0, 0.5}});
  measured.measured.push_back({4, {1}, {0}, {{5}}, {}});
  CHECK(dw::time_us(measured, 15, 50, 1) == 3.5, "found %g", dw::time_us(measured, 15, 50, 1));
  CHECK(dw::time_us(measured, 30, 0, 1) == 3.0, "beyond the points");
  CHECK(dw::time_us(measured, -100, 0, 1) == 0.0, "never negative");
  CHECK(dw::time_us(measured, 15, 50, 8) == 5.0, "the nearest number of threads");
  dw::TaskGraph graph;
  graph.chunks = {{50, 15, 15}};
  graph.call_of = graph.chunk_of = {0};
  dw::CostTables tables;
  tables.segments = {measured};
  for (const auto& [threads, share] : {std::pair(1, 0.75), std::pair(4, 1.0)}) {
    const dw::Costs costs =
        dw::costs_of(tables, {{0, 0, false, false}}, graph, threads, 1, false, 0);
    CHECK(costs.repeated[0] == share, "found %g", costs.repeated[0]);
  }
  dw::SegmentTimes estimated;
  estimated.estimated.launch_us = 10;
  estimated.estimated.row_us = 4;
  estimated.estimated.cores = 2;
  estimated.estimated.row_bytes_us = 3;
  estimated.estimated.counted_us = {{7, 100}};
  CHECK(dw::time_us(estimated, 5, 0, 1) == 30, "bound by computing");
  CHECK(dw::time_us(estimated, 5, 0, 8) == 25, "then by bytes, on two cores");
  CHECK(dw::time_us(estimated, 7, 0, 8) == 110, "the compiler's count");
  dw::SegmentTimes experts;
  experts.estimated.call_bytes_us = 10;
  experts.estimated.expert_bytes_us = 400;
  experts.estimated.expert_share = 0.25;
  CHECK(dw::time_us(experts, 1, 0, 1) == 110, "the experts of one row");
  CHECK(dw::time_us(experts, 2, 0, 1) == 185, "of two rows that may share them");
  CHECK(std::abs(dw::time_us(experts, 512, 0, 1) - 410) < 1e-9, "all of them");
}

dw::Outline outline() {
  return {{{}, 8},
          {"npu", "cpu"},
          "npu",
          {{0, 0, false, false}, {1, 1, false, false}, {0, 0, false, false}, {2, 0, false, true}},
          pattern(),
          {},
          1000};
}

// Blocks take 100 us, attention 60 and the head 10, whatever the rows.
dw::Machine machine() {
  dw::Machine found;
  for (const double us : {100.0, 60.0, 10.0}) {
    found.costs.segments.push_back({{{1, {1}, {0}, {{us}}, {}}}, {}});
  }
  found.costs.hand_over_ns = {{0, 1000}, {2000, 0}};
  found.most_tasks = {0, 0};
  found.overlapping = "wavefront";
  return found;
}

doubleweave::Times simulate(const dw::PlannedRun& run) {
  std::vector<int32_t> device;
  for (const int32_t call : run.graph.call_of) {
    device.push_back(call == 1 ? 1 : 0);
  }
  return dw::times_of(run.schedule,
                      {run.graph.call_of,
                       run.graph.chunk_of,
                       run.graph.after_starts,
                       run.graph.after,
                       device,
                       {"npu", "cpu"}},
                      run.costs);
}

void test_schedules() {
  const dw::Planner planner(outline(), machine());
  for (const char* name : dw::kSchedules) {
    const dw::Choice choice{name, {"npu", "cpu"}, 1, 8, 8, 1};
    const dw::PlannedRun run = planner.run(choice, 32);
    std::vector<int32_t> placed;
    for (const auto& list : run.schedule.lists) {
      std::copy_if(list.begin(), list.end(), std::back_inserter(placed),
                   [](int32_t task) { return task != dw::kBarrier; });
    }
    std::sort(placed.begin(), placed.end());
    std::vector<int32_t> every(run.graph.size());
    std::iota(every.begin(), every.end(), 0);
    CHECK(placed == every, "%s places each task once", name);
    const doubleweave::Times times = simulate(run);
    const int64_t end = *std::max_element(times.end_ns.begin(), times.end_ns.end());
    const int64_t work =
        std::accumulate(run.costs.duration_ns.begin(), run.costs.duration_ns.end(), int64_t{0});
    CHECK(work == (4 * 260 + 10) * 1000, "found %lld", static_cast<long long>(work));
    const bool is_alone = std::string(name) == "sequential";
    CHECK(is_alone ? end == work : end < work, "%s takes %lld", name, static_cast<long long>(end));
  }
  CHECK_REFUSED(planner.run({"pipelined", {"npu"}, 1, 8, 8, 1}, 32),
                "workers: found npu, but the program has segments for 'cpu'; add a worker for it, "
                "such as --workers npu,cpu");
}

void test_barriers_are_dependencies() {
  const std::vector<int32_t> starts{0, 0, 0, 1, 1};
  const std::vector<int32_t> after{0};
  const dw::Ordered found = dw::without_barriers({{0, -1, 2}, {1, -1, 3}}, starts, after);
  CHECK(found.lists == (dw::Lists{{0, 2}, {1, 3}}), "tasks alone");
  CHECK(found.after == (std::vector<int32_t>{0, 1, 0}), "each waits for the other's last");
  CHECK(found.after_starts == (std::vector<int32_t>{0, 0, 0, 2, 3}), "starts");
}

void test_the_planner_chooses() {
  dw::Planner ruled(outline(), machine());
  const auto schedule = [](dw::Planner& planner, int tokens, int threads) {
    return planner.choose({"auto", {}, {}, threads}, tokens).schedule;
  };
  CHECK(schedule(ruled, 4, 2) == "sequential" && schedule(ruled, 5, 2) == "wavefront", "the rule");
  CHECK(schedule(ruled, 500, 1) == "sequential", "one thread");
  CHECK(ruled.choose({"pipelined", {}, {}, 2}, 8).schedule == "sequential", "a single chunk");
  CHECK(ruled.default_threads(6) == 6 && ruled.default_threads(6, 4) == 4, "this machine's");

  dw::Machine with_decisions = machine();
  with_decisions.threads = 2;
  with_decisions.decisions = {{10, {"lockstep", {"npu", "cpu"}, 1, 8, 2, 1}},
                              {50, {"pipelined", {"npu", "cpu"}, 1, 8, 8, 1}}};
  dw::Planner decided(outline(), with_decisions);
  CHECK(schedule(decided, 10, 2) == "lockstep" && schedule(decided, 11, 2) == "pipelined" &&
            schedule(decided, 900, 2) == "pipelined",
        "by length");
  CHECK(schedule(decided, 900, 3) == "wavefront", "for as many threads alone");
  CHECK(decided.default_threads(6) == 2, "the decisions'");

  dw::Machine chip = machine();
  chip.most_tasks = {1, 3};
  dw::Planner planned(outline(), chip);
  CHECK(planned.default_threads(64) == 3, "the chip's CPU");
  for (const dw::Choice& choice : planned.candidates(64, 4)) {
    const auto on_npu = std::count_if(
        choice.workers.begin(), choice.workers.end(),
        [](const std::string& worker) { return worker == "npu" || worker == dw::kAny; });
    CHECK(on_npu <= 1, "%s gives the NPU %td workers", choice.schedule.c_str(), on_npu);
  }
  const dw::Choice best = planned.best(64, 3);
  CHECK(best == planned.choose({"auto", {}, {}, 3}, 64), "auto plans for a described chip");
  CHECK(best.schedule != "sequential", "found %s", best.schedule.c_str());
  CHECK(planned.choose({"auto", {}, {}, 3}, 50) == best, "at the next length of the grid");
}

}  // namespace

int main() {
  test_chunks();
  test_choices();
  test_task_graphs();
  test_chunks_abreast_keep_close();
  test_times_of_a_segment();
  test_schedules();
  test_barriers_are_dependencies();
  test_the_planner_chooses();
  return check::finish();
}

#include "trace.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "doubleweave/error.h"

namespace doubleweave::runner {

namespace {

using Json = nlohmann::json;

// Names of colours that trace viewers know.
constexpr std::array<const char*, 8> kColours{
    "thread_state_running",  "rail_animation", "thread_state_iowait", "rail_load",
    "thread_state_runnable", "rail_response",  "cq_build_passed",     "rail_idle"};

// Segments that differ in their number are of one kind: "block_*".
std::string pattern_of(const std::string& name) {
  const size_t line = name.rfind('_');
  const bool is_numbered = line != std::string::npos && line + 1 < name.size() &&
                           name.find_first_not_of("0123456789", line + 1) == std::string::npos;
  return is_numbered ? name.substr(0, line) + "_*" : name;
}

double us(int64_t ns) { return static_cast<double>(ns) / 1e3; }

bool reads_from(const RunFile& file, const scheduling::TaskGraph& graph, int32_t task,
                int32_t before) {
  const auto& reads = file.calls[graph.call_of[static_cast<size_t>(task)]].reads;
  const auto& writes = file.calls[graph.call_of[static_cast<size_t>(before)]].writes;
  return std::ranges::any_of(
      reads, [&](int value) { return std::ranges::find(writes, value) != writes.end(); });
}

using Changes = std::map<int64_t, double>;

// Bytes of keys and values, and of buffers between their writer's start and last reader's end.
std::pair<Changes, Changes> changes_of(const RunFile& file, const scheduling::TaskGraph& graph,
                                       const std::vector<Event>& by_task) {
  Changes cache{{0, 0.0}};
  Changes buffers;
  std::map<std::pair<int, int>, std::pair<const Event*, int64_t>>
      spans;  // writer, last reader's end
  for (size_t task = 0; task < graph.size(); ++task) {
    const Call& call = file.calls[graph.call_of[task]];
    const int chunk = graph.chunk_of[task];
    for (const int value : call.writes) {
      if (file.values[value].kind == Kind::kCache) {
        cache[by_task[task].end_ns] +=
            static_cast<double>(file.values[value].row_bytes * graph.chunks[chunk].num_tokens);
      } else if (file.values[value].kind == Kind::kChunk) {
        spans[{value, chunk}] = {&by_task[task], by_task[task].end_ns};
      }
    }
    for (const int value : call.reads) {
      const auto found = spans.find({value, chunk});
      if (found != spans.end()) {
        found->second.second = std::max(found->second.second, by_task[task].end_ns);
      }
    }
  }
  for (const auto& [key, span] : spans) {
    const auto bytes =
        static_cast<double>(file.values[key.first].row_bytes * graph.chunks[key.second].num_tokens);
    buffers[span.first->start_ns] += bytes;
    buffers[span.second] -= bytes;
  }
  return {cache, buffers};
}

void add_counter(Json& events, const std::string& name, const Changes& changes) {
  double total = 0.0;
  for (const auto& [at, change] : changes) {
    total += change;
    events.push_back({{"ph", "C"},
                      {"pid", 0},
                      {"name", name + " (bytes)"},
                      {"ts", us(at)},
                      {"args", {{"bytes", total}}}});
  }
}

Json trace_of(const RunFile& file, const Prepared& prepared, const Timeline& timeline) {
  const scheduling::TaskGraph& graph = prepared.run.graph;
  std::vector<Event> order = timeline.events;
  std::ranges::sort(order, [](const Event& a, const Event& b) {
    return std::pair(a.start_ns, a.task) < std::pair(b.start_ns, b.task);
  });
  std::vector<Event> by_task(graph.size());
  std::vector<int> place(graph.size());
  for (size_t i = 0; i < order.size(); ++i) {
    by_task[static_cast<size_t>(order[i].task)] = order[i];
    place[static_cast<size_t>(order[i].task)] = static_cast<int>(i);
  }
  const scheduling::Chunk& last = graph.chunks.back();
  const std::string title = prepared.run.choice.schedule + ", " +
                            std::to_string(last.start + last.num_tokens) + " tokens, measured";
  Json events = Json::array();
  events.push_back(
      {{"ph", "M"}, {"pid", 0}, {"name", "process_name"}, {"args", {{"name", title}}}});
  for (size_t worker = 0; worker < prepared.run.schedule.workers.size(); ++worker) {
    const std::string name =
        "worker " + std::to_string(worker) + " " + prepared.run.schedule.workers[worker];
    events.push_back({{"ph", "M"},
                      {"pid", 0},
                      {"tid", worker},
                      {"name", "thread_name"},
                      {"args", {{"name", name}}}});
  }
  Json chunks = Json::array();
  for (const scheduling::Chunk& chunk : graph.chunks) {
    chunks.push_back(Json::array({chunk.start, chunk.num_tokens, chunk.compiled_size}));
  }
  Json links = Json::array();
  Json arrows = Json::array();
  for (const Event& event : order) {
    const auto task = static_cast<size_t>(event.task);
    const Call& call = file.calls[graph.call_of[task]];
    const Segment& segment = file.segments[call.segment];
    const int number = graph.chunk_of[task];
    const scheduling::Chunk& chunk = graph.chunks[number];
    events.push_back({{"ph", "X"},
                      {"pid", 0},
                      {"tid", event.worker},
                      {"name", call.name + "/" + std::to_string(number)},
                      {"cat", pattern_of(segment.name)},
                      {"ts", us(event.start_ns)},
                      {"dur", us(event.end_ns - event.start_ns)},
                      {"cname", kColours[static_cast<size_t>(number) % kColours.size()]},
                      {"args",
                       {{"segment", segment.name},
                        {"device", segment.device},
                        {"chunk", number},
                        {"first_token", chunk.start},
                        {"tokens", chunk.num_tokens},
                        {"compiled_size", chunk.compiled_size}}}});
    for (int32_t i = prepared.order.after_starts[task]; i < prepared.order.after_starts[task + 1];
         ++i) {
      const int32_t before = prepared.order.after[i];
      const Event& source = by_task[static_cast<size_t>(before)];
      if (source.worker == event.worker ||
          !reads_from(file, graph, static_cast<int32_t>(task), before)) {
        continue;
      }
      const size_t id = links.size();
      links.push_back(Json::array({place[static_cast<size_t>(before)], place[task]}));
      const Json common{{"pid", 0}, {"cat", "hand-over"}, {"name", "hand-over"}, {"id", id}};
      const Json begin{{"ph", "s"}, {"tid", source.worker}, {"ts", us(source.end_ns)}};
      const Json end{{"ph", "f"}, {"bp", "e"}, {"tid", event.worker}, {"ts", us(event.start_ns)}};
      for (const Json& arrow : {begin, end}) {
        arrows.push_back(common);
        arrows.back().update(arrow);
      }
    }
  }
  events.insert(events.end(), arrows.begin(), arrows.end());
  const auto [cache, buffers] = changes_of(file, graph, by_task);
  add_counter(events, "KV cache", cache);
  add_counter(events, "buffers in flight", buffers);
  return {{"traceEvents", events},
          {"displayTimeUnit", "ms"},
          {"otherData",
           {{"format", "doubleweave timeline 1"},
            {"title", title},
            {"num_workers", prepared.run.schedule.workers.size()},
            {"devices", prepared.run.schedule.workers},
            {"chunks", chunks},
            {"links", links},
            {"counters", Json::array({Json::array({"KV cache", "bytes"}),
                                      Json::array({"buffers in flight", "bytes"})})}}}};
}

}  // namespace

void check_trace_path(const std::filesystem::path& path) {
  require(path.extension() == ".json", "trace: found '", path.filename().string(),
          "', expected a file name that ends in .json (doubleweave trace draws it)");
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  std::error_code error;
  require(std::filesystem::is_directory(folder, error), "trace: folder ", folder.string(),
          " does not exist; make it first");
}

void write_trace(const std::filesystem::path& path, const RunFile& file, const Prepared& prepared,
                 const Timeline& timeline) {
  std::filesystem::path temporary = path;
  temporary.replace_filename("." + path.stem().string() + ".part.json");
  std::error_code error;
  {
    std::ofstream stream(temporary, std::ios::binary);
    stream << trace_of(file, prepared, timeline).dump() << '\n';
    stream.close();
    if (!stream) {
      std::filesystem::remove(temporary, error);
      throw Error(path.string() + ": cannot be written; choose another file with --trace");
    }
  }
  std::filesystem::rename(temporary, path, error);
  if (error) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    throw Error(path.string() + ": cannot be written (" + error.message() + ")");
  }
}

}  // namespace doubleweave::runner

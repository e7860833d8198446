#include "session.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>

#include "doubleweave/error.h"
#include "doubleweave/threads.h"
#include "known_program.h"

namespace doubleweave::runner {

namespace {

const std::string kInputIds = "input_ids";

std::vector<size_t> cache_rows(const RunFile& file) {
  std::vector<size_t> rows;
  for (const Value& value : file.values) {
    if (value.kind == Kind::kCache) {
      rows.push_back(static_cast<size_t>(value.row_bytes));
    }
  }
  return rows;
}

std::vector<int64_t> cache_windows(const RunFile& file) {
  std::vector<int64_t> windows;
  for (const Value& value : file.values) {
    if (value.kind == Kind::kCache) windows.push_back(value.window);
  }
  return windows;
}

// Both copies of each state.
std::vector<size_t> state_bytes(const RunFile& file) {
  std::vector<size_t> found;
  for (const Value& value : file.values) {
    if (value.kind == Kind::kState) {
      found.push_back(2 * static_cast<size_t>(value.row_bytes));
    }
  }
  return found;
}

std::string checked_program(const std::filesystem::path& folder, const RunFile& file) {
  const std::filesystem::path path = folder / "program.pte";
  std::error_code error;
  const auto bytes = std::filesystem::file_size(path, error);
  require(!error, path.string(), ": cannot be read (", error.message(),
          "); compile the program again");
  require(static_cast<int64_t>(bytes) == file.program_bytes, path.string(), ": found ", bytes,
          " bytes, expected ", file.program_bytes, " (run.json's); compile the program again");
  return path.string();
}

// The buffer of a value of a chunk that lies in a slot of its lane, or of the output.
int buffer_of(const RunFile& file, const scheduling::TaskGraph& graph, int value, int chunk) {
  const int slots = static_cast<int>(file.slot_row_bytes.size());
  const int slot = file.slot_of[value];
  return slot < 0 ? graph.lanes * slots : chunk % graph.lanes * slots + slot;
}

std::vector<size_t> buffer_bytes(const RunFile& file, const scheduling::TaskGraph& graph) {
  int64_t rows = 0;
  for (const scheduling::Chunk& chunk : graph.chunks) {
    rows = std::max<int64_t>(rows, chunk.compiled_size);
  }
  std::vector<size_t> found;
  for (int lane = 0; lane < graph.lanes; ++lane) {
    for (const int64_t bytes : file.slot_row_bytes) {
      found.push_back(static_cast<size_t>(bytes * rows));
    }
  }
  const bool one_row = std::ranges::any_of(file.calls, [&](const Call& call) {
    return call.last_row && std::ranges::find(call.writes, file.output) != call.writes.end();
  });
  found.push_back(static_cast<size_t>(file.values[file.output].row_bytes * (one_row ? 1 : rows)));
  return found;
}

// How many rows of a chunk a call computes.
int rows_of(const RunFile& file, const Call& call, const scheduling::Chunk& chunk) {
  if (call.last_row || file.segments[call.segment].each_row) {
    return 1;
  }
  return file.segments[call.segment].is_static ? chunk.compiled_size : chunk.num_tokens;
}

bool has(const std::vector<int32_t>& shape, int32_t size) {
  return std::ranges::find(shape, size) != shape.end();
}

}  // namespace

Session::Session(const std::filesystem::path& folder, const RunFile& file,
                 scheduling::Planner& planner, scheduling::Wish wish)
    : file_(file),
      planner_(planner),
      wish_(std::move(wish)),
      program_(checked_program(folder, file), file.program_digests),
      packed_(packed_weights(program_.path(), file)),
      cache_(cache_rows(file), file.max_context, file.outline.rows.most, cache_windows(file)),
      states_(state_bytes(file)),
      region_of_(file.values.size(), -1),
      positions_(static_cast<size_t>(file.max_context + file.outline.rows.most)) {
  std::iota(positions_.begin(), positions_.end(), 0);
  clear();
  int next = 0;
  for (const Kind kind : {Kind::kInput, Kind::kCache, Kind::kState}) {
    for (size_t value = 0; value < file.values.size(); ++value) {
      if (file.values[value].kind == kind) {
        region_of_[value] = next++;
      }
    }
  }
}

size_t Session::kv_bytes_peak() const {
  // An NPU that reads the whole cache in every run takes all of it, whatever is in use.
  const bool is_whole = std::ranges::any_of(file_.segments, [](const Segment& segment) {
    return !segment.each_row && std::ranges::any_of(segment.inputs, [](const auto& shape) {
      return shape.size() == 3 && !has(shape, kRows) && !has(shape, kCached);
    });
  });
  if (!is_whole) {
    return cache_.peak_bytes();
  }
  const std::vector<size_t> rows = cache_rows(file_);
  return static_cast<size_t>(file_.max_context) *
         std::accumulate(rows.begin(), rows.end(), size_t{0});
}

std::span<const float> Session::append(std::span<const int64_t> ids, Timeline* timeline) {
  require(!ids.empty(), "token ids: found none, expected at least one: the prompt is empty");
  for (const int64_t id : ids) {
    require(id >= 0 && id < file_.vocab_size, "token ids: found ", id, ", expected 0 to ",
            file_.vocab_size - 1, " (the vocabulary)");
  }
  require(length() + static_cast<int64_t>(ids.size()) <= file_.max_context, "context: ", length(),
          " tokens in the cache and ", ids.size(), " more, expected at most ", file_.max_context,
          ": shorten the prompt");
  change_frequencies(length() + static_cast<int64_t>(ids.size()));
  const std::span<const float> logits = run(ids, timeline);
  if (file_.rotary_border > 0) {
    ids_.insert(ids_.end(), ids.begin(), ids.end());
  }
  return logits;
}

// LongRoPE: all tokens of a text longer than the border have other frequencies, so a text that
// passes it is computed anew (runtime/llm/frequencies.py of the Python package).
void Session::change_frequencies(int64_t num_tokens) {
  const bool is_long = file_.rotary_border > 0 && num_tokens > file_.rotary_border;
  if (is_long == is_long_) {
    return;
  }
  is_long_ = is_long;
  for (int64_t& position : positions_) {
    position = ~position;
  }
  clear();
  if (!ids_.empty()) {
    run(ids_, nullptr);
  }
}

void Session::clear() {
  cache_.truncate(0);
  for (size_t state = 0; state < states_.num_buffers(); ++state) {
    std::memset(states_.data(state), 0, states_.bytes(state));
  }
}

std::span<const float> Session::run(std::span<const int64_t> ids, Timeline* timeline) {
  Prepared& prepared = prepare(static_cast<int>(ids.size()));
  std::ranges::copy(ids, prepared.input_ids.begin());
  const int base = length();
  const scheduling::TaskGraph& graph = prepared.run.graph;
  const scheduling::Chunk& last = graph.chunks.back();
  cache_.prepare(base + last.start + last.compiled_size);
  prepared.execution->run(base, timeline);
  cache_.note_length(base + static_cast<int64_t>(ids.size()), last.compiled_size - last.num_tokens);
  if (ids.size() > 1) {
    program_.trim();
  }
  last_ = &prepared;
  const int output =
      buffer_of(file_, graph, file_.output, static_cast<int>(graph.chunks.size()) - 1);
  const auto* logits =
      static_cast<const float*>(prepared.buffers->data(static_cast<size_t>(output)));
  return {logits, static_cast<size_t>(file_.vocab_size)};
}

Prepared& Session::prepare(int num_tokens) {
  const auto found = prepared_.find(num_tokens);
  if (found != prepared_.end()) {
    return *found->second;
  }
  auto made = std::make_unique<Prepared>();
  made->run = planner_.run(planner_.choose(wish_, num_tokens), num_tokens);
  const scheduling::TaskGraph& graph = made->run.graph;
  made->order =
      scheduling::without_barriers(made->run.schedule.lists, graph.after_starts, graph.after);
  made->buffers = std::make_unique<Buffers>(buffer_bytes(file_, graph));
  const scheduling::Chunk& last = graph.chunks.back();
  made->input_ids.assign(static_cast<size_t>(last.start + last.compiled_size), 0);
  load(*made);
  std::vector<Instance*> loaded;
  std::vector<Task> tasks = tasks_of(*made, loaded);
  made->execution = std::make_unique<Execution>(std::move(loaded), regions(*made), std::move(tasks),
                                                made->order.lists, made->run.choice.threads);
  return *(prepared_[num_tokens] = std::move(made));
}

std::string Session::method_of(const Prepared& prepared, int call, int chunk) const {
  const Segment& segment = file_.segments[file_.calls[call].segment];
  const int rows = rows_of(file_, file_.calls[call], prepared.run.graph.chunks[chunk]);
  return segment.is_static ? segment.name + "@" + std::to_string(rows) : segment.name;
}

// Methods load on every core at once, since packing weights is most of it; but those of a backend
// that cannot do that load one behind the other.
void Session::load(const Prepared& prepared) {
  std::map<std::string, const Segment*> segments;
  for (size_t task = 0; task < prepared.run.graph.size(); ++task) {
    const int call = prepared.run.graph.call_of[task];
    const std::string method = method_of(prepared, call, prepared.run.graph.chunk_of[task]);
    if (instances_.contains({method, 0})) {
      continue;
    }
    const Segment& segment = file_.segments[file_.calls[call].segment];
    if (segment.loads_alone) {
      instances_[{method, 0}] = program_.load(method, segment.group);
    } else {
      segments[method] = &segment;
    }
  }
  const std::vector<std::pair<std::string, const Segment*>> todo(segments.begin(), segments.end());
  std::vector<std::unique_ptr<Instance>> made(todo.size());
  std::atomic<size_t> next{0};
  std::exception_ptr failed;
  std::mutex mutex;
  const auto work = [&] {
    for (size_t i = next++; i < todo.size(); i = next++) {
      try {
        const auto& [method, segment] = todo[i];
        made[i] = packed_.load(program_, method, segment->group, segment->weight_bytes);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failed = std::current_exception();
        next = todo.size();
      }
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (int i = 1; i < max_threads(); ++i) {
      helpers.emplace_back(work);
    }
    work();
  }
  if (failed) {
    std::rethrow_exception(failed);
  }
  for (size_t i = 0; i < todo.size(); ++i) {
    instances_[{todo[i].first, 0}] = std::move(made[i]);
  }
}

Instance* Session::instance(const std::string& method, int copy) {
  std::unique_ptr<Instance>& found = instances_[{method, copy}];
  if (found == nullptr) {
    found = program_.load(method);
  }
  return found.get();
}

std::vector<Task> Session::tasks_of(const Prepared& prepared, std::vector<Instance*>& loaded) {
  const scheduling::TaskGraph& graph = prepared.run.graph;
  std::vector<int> worker_of(graph.size());
  for (size_t worker = 0; worker < prepared.order.lists.size(); ++worker) {
    for (const int32_t task : prepared.order.lists[worker]) {
      worker_of[static_cast<size_t>(task)] = static_cast<int>(worker);
    }
  }
  std::map<Instance*, int> numbers;
  std::vector<Task> tasks(graph.size());
  for (size_t number = 0; number < graph.size(); ++number) {
    const int call_index = graph.call_of[number];
    const int chunk_index = graph.chunk_of[number];
    const Call& call = file_.calls[call_index];
    const Segment& segment = file_.segments[call.segment];
    const scheduling::Chunk& chunk = graph.chunks[chunk_index];
    const int rows = rows_of(file_, call, chunk);
    Instance* used = instance(method_of(prepared, call_index, chunk_index),
                              segment.per_worker ? worker_of[number] : 0);
    const auto [place, is_new] = numbers.emplace(used, static_cast<int>(loaded.size()));
    if (is_new) {
      loaded.push_back(used);
    }
    Task& task = tasks[number];
    task.instance = place->second;
    const auto after = prepared.order.after.begin();
    task.after.assign(after + prepared.order.after_starts[number],
                      after + prepared.order.after_starts[number + 1]);
    task.label = static_cast<int32_t>(number);
    task.num_rows = segment.each_row ? chunk.num_tokens : 1;
    const int first = call.last_row ? chunk.num_tokens - 1 : 0;
    for (size_t i = 0; i < call.reads.size(); ++i) {
      task.inputs.push_back(bind(prepared, segment, call.reads[i], segment.inputs[i], chunk_index,
                                 rows, first, false));
    }
    for (size_t i = 0; i < call.writes.size(); ++i) {
      task.outputs.push_back(
          bind(prepared, segment, call.writes[i], segment.outputs[i], chunk_index, rows, 0, true));
    }
  }
  return tasks;
}

Binding Session::bind(const Prepared& prepared, const Segment& segment, int value_index,
                      const std::vector<int32_t>& shape, int chunk_index, int rows, int first,
                      bool writes) const {
  const Value& value = file_.values[value_index];
  const scheduling::Chunk& chunk = prepared.run.graph.chunks[chunk_index];
  const int cached = has(shape, kCached) ? chunk.start + chunk.num_tokens : 0;
  Binding binding;
  for (const int32_t size : shape) {
    binding.sizes.push_back(size == kRows ? rows : size == kCached ? cached : size);
  }
  if (value.kind == Kind::kState) {
    binding.buffer =
        static_cast<int32_t>(prepared.buffers->num_buffers()) + region_of_[value_index];
    binding.copy_bytes = value.row_bytes;
    binding.first_copy = (chunk.start + (writes ? 1 : 0)) % 2;
    return binding;
  }
  binding.offset_per_row = segment.each_row ? value.row_bytes : 0;
  if (value.kind != Kind::kInput && value.kind != Kind::kCache) {
    binding.buffer = buffer_of(file_, prepared.run.graph, value_index, chunk_index);
    binding.offset = first * value.row_bytes;
    return binding;
  }
  binding.buffer = static_cast<int32_t>(prepared.buffers->num_buffers()) + region_of_[value_index];
  if (has(shape, kCached)) {
    binding.grow_dim = static_cast<int32_t>(std::ranges::find(shape, kCached) - shape.begin());
  } else if (has(shape, kRows)) {
    // Token ids are this run's own; positions and cache rows go on behind the cached tokens.
    binding.offset = (chunk.start + first) * value.row_bytes;
    binding.offset_per_token = value.name == kInputIds ? 0 : value.row_bytes;
  }
  return binding;
}

std::vector<Region> Session::regions(Prepared& prepared) {
  std::vector<Region> found;
  for (size_t id = 0; id < prepared.buffers->num_buffers(); ++id) {
    found.emplace_back(prepared.buffers->data(id), prepared.buffers->bytes(id));
  }
  for (const Value& value : file_.values) {
    if (value.kind == Kind::kInput) {
      auto& memory = value.name == kInputIds ? prepared.input_ids : positions_;
      found.emplace_back(memory.data(), memory.size() * sizeof(int64_t));
    }
  }
  for (size_t entry = 0; entry < cache_.num_entries(); ++entry) {
    found.emplace_back(cache_.data(entry), cache_.capacity_bytes(entry));
  }
  for (size_t state = 0; state < states_.num_buffers(); ++state) {
    found.emplace_back(states_.data(state), states_.bytes(state));
  }
  return found;
}

std::string schedule_text(const RunFile& file, const Prepared& prepared) {
  const auto& [choice, graph, costs, schedule] = prepared.run;
  std::string text;
  for (size_t worker = 0; worker < schedule.workers.size(); ++worker) {
    text += schedule.workers[worker] + ":";
    const auto& tasks = schedule.lists[worker];
    for (const int32_t task : tasks) {
      if (task == scheduling::kBarrier) {
        text += " |";
        continue;
      }
      const scheduling::Chunk& chunk = graph.chunks[graph.chunk_of[task]];
      text += " " + file.calls[graph.call_of[task]].name + "/" + std::to_string(chunk.start) + "+" +
              std::to_string(chunk.num_tokens) + "@" + std::to_string(chunk.compiled_size);
    }
    text += tasks.empty() ? " " : "";
    text += '\n';
  }
  return text;
}

}  // namespace doubleweave::runner

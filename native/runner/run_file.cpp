#include "run_file.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>

#include "doubleweave/digest.h"
#include "doubleweave/error.h"

namespace doubleweave::scheduling {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(MeasuredTimes, threads, rows, cached, us, repeated)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(EstimatedTimes, launch_us, cores, row_us, square_us, key_us,
                                   call_bytes_us, row_bytes_us, cached_bytes_us, expert_bytes_us,
                                   expert_share, counted_us)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(ContentionTable, workers, shares)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Choice, schedule, workers, threads, chunk, in_flight, abreast)

}  // namespace doubleweave::scheduling

namespace doubleweave::runner {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Chat, before, behind, strips)

namespace {

using Json = nlohmann::json;
using Names = std::map<std::string, int>;

constexpr int kVersion = 8;
constexpr double kMostUs = 1e9;

int index_of(const Names& names, const Json& name, const char* what) {
  const auto found = names.find(name.get<std::string>());
  require(found != names.end(), what, " '", name.get<std::string>(), "' is not known");
  return found->second;
}

void check_places(const std::vector<int32_t>& places, size_t count, const char* what) {
  require(std::ranges::all_of(
              places, [&](int place) { return place >= 0 && static_cast<size_t>(place) < count; }),
          what);
}

const Json& list_in(const Json& data, const char* name) {
  const Json& found = data.at(name);
  require(found.is_array(), "it has no list where one belongs");
  return found;
}

std::vector<std::vector<int32_t>> shapes_of(const Json& ports) {
  std::vector<std::vector<int32_t>> shapes;
  for (const Json& port : ports) {
    auto& shape = shapes.emplace_back();
    for (const Json& size : port) {
      shape.push_back(size == "T" ? kRows : size == "S" ? kCached : size.get<int32_t>());
    }
  }
  return shapes;
}

void check_measured(const std::vector<scheduling::MeasuredTimes>& tables) {
  for (const scheduling::MeasuredTimes& times : tables) {
    const auto rises = [](const std::vector<double>& points) {
      return std::ranges::adjacent_find(points, std::greater_equal<>()) == points.end();
    };
    require(rises(times.rows) && rises(times.cached), "a segment's times are not in order");
    for (const std::vector<double>& row : times.us) {
      require(std::ranges::all_of(row, [](double us) { return us >= 0 && us <= kMostUs; }),
              "a segment's time is out of range");
    }
    require(!times.rows.empty() && times.us.size() == times.rows.size() && !times.cached.empty() &&
                std::ranges::all_of(
                    times.us, [&](const auto& row) { return row.size() == times.cached.size(); }) &&
                (times.repeated.empty() || times.repeated.size() == times.cached.size()),
            "a segment's times are not a table");
  }
}

void check_estimated(const scheduling::EstimatedTimes& times) {
  require(times.cores > 0, "a segment's estimate is for no core");
  for (const double us :
       {times.launch_us, times.row_us, times.square_us, times.key_us, times.call_bytes_us,
        times.row_bytes_us, times.cached_bytes_us, times.expert_bytes_us}) {
    require(us >= 0 && us <= kMostUs, "a segment's estimate is out of range");
  }
  require(times.expert_share >= 0 && times.expert_share <= 1,
          "a segment's rows choose more experts than there are");
}

scheduling::SegmentTimes times_of(const Json& item) {
  scheduling::SegmentTimes times{item.at("measured"), {}};
  check_measured(times.measured);
  if (times.measured.empty()) {
    item.at("estimated").get_to(times.estimated);
    check_estimated(times.estimated);
  }
  return times;
}

std::vector<scheduling::Wait> waits_of(const Json& rows, size_t tasks, size_t same, size_t before) {
  std::vector<scheduling::Wait> waits;
  for (const Json& row : rows) {
    const scheduling::Wait wait{row.at(0), row.at(1), row.at(2)};
    check_places({wait.task}, tasks, "a wait is of no task");
    check_places({wait.other}, wait.chunks == 0 ? same : before, "a wait is for no task");
    require(wait.chunks <= scheduling::kLaneBefore, "a wait is for a later chunk");
    waits.push_back(wait);
  }
  return waits;
}

scheduling::Pattern pattern_of(const Json& data, size_t calls) {
  scheduling::Pattern pattern{data.at("body"), data.at("last"), {}, {}};
  check_places(pattern.body, calls, "a pattern has a call that does not exist");
  check_places(pattern.last, calls, "a pattern has a call that does not exist");
  const size_t body = pattern.body.size();
  const size_t last = pattern.last.size();
  pattern.body_waits = waits_of(list_in(data, "body_waits"), body, body, body);
  pattern.last_waits = waits_of(list_in(data, "last_waits"), last, last, body);
  return pattern;
}

// The model's decoder reads what an encoder gives: the file is right, and is not run.
struct HasEncoder {};

Kind kind_of(const std::string& name) {
  // As in Kind.
  constexpr std::array kNames{"input", "chunk", "cache", "state", "output", "encoded"};
  const auto* found = std::ranges::find(kNames, name);
  require(found != kNames.end(), "a value is of an unknown kind");
  return static_cast<Kind>(found - kNames.begin());
}

void check_calls(const std::vector<int>& calls, const std::vector<int>& blocks) {
  require(!calls.empty() && std::ranges::is_sorted(calls), "a pattern's calls are not in order");
  require(std::ranges::all_of(blocks,
                              [&](int block) { return std::ranges::binary_search(calls, block); }),
          "a pattern lacks a block");
}

// Nothing that is computed from these may overflow, or take for ever.
void check_ranges(const RunFile& file) {
  constexpr int kMostTokens = 1 << 24;
  constexpr int kMostRows = 1 << 16;
  constexpr int64_t kMostBytes = int64_t{1} << 30;
  const scheduling::Outline& outline = file.outline;
  const scheduling::Machine& machine = file.machine;
  require(outline.rows.most > 0 && outline.rows.most <= kMostRows && file.max_context > 0 &&
              file.max_context <= kMostTokens && file.rotary_border >= 0 &&
              file.rotary_border < file.max_context && file.vocab_size > 0 &&
              file.vocab_size <= kMostTokens && outline.scratch.groups >= 0 &&
              machine.threads >= 0 && machine.costs.same_worker_ns >= 0 && !file.calls.empty(),
          "a size is out of range");
  require(std::ranges::all_of(outline.rows.fixed,
                              [&](int size) { return size > 0 && size <= outline.rows.most; }),
          "a compiled size is out of range");
  for (const Value& value : file.values) {
    require(value.row_bytes > 0 && value.row_bytes <= kMostBytes, "a value's size is out of range");
  }
  const Value& output = file.values[static_cast<size_t>(file.output)];
  require(output.kind == Kind::kOutput &&
              output.row_bytes == static_cast<int64_t>(sizeof(float)) * file.vocab_size,
          "its output is not the vocabulary's");
  require(scheduling::is_schedule(machine.overlapping), "a schedule is not known");
  for (const scheduling::Decision& decision : machine.decisions) {
    const scheduling::Choice& choice = decision.choice;
    require(scheduling::is_schedule(choice.schedule) && !choice.workers.empty() &&
                choice.threads > 0 && choice.chunk > 0 && choice.in_flight > 0 &&
                choice.abreast > 0 && choice.abreast <= kMostRows,
            "a decision is out of range");
  }
}

void check_costs(const scheduling::CostTables& costs, size_t devices) {
  const auto is_square = [&](const auto& rows) {
    return rows.size() == devices &&
           std::ranges::all_of(rows, [&](const auto& row) { return row.size() == devices; });
  };
  require(is_square(costs.hand_over_ns) &&
              std::ranges::all_of(costs.contention,
                                  [&](const auto& one) { return is_square(one.shares); }),
          "its costs do not fit its devices");
}

scheduling::Outline outline_of(const Json& data, const RunFile& file) {
  scheduling::Outline outline;
  outline.rows = {data.at("sizes").get<std::vector<int>>(), data.at("most_rows")};
  data.at("devices").get_to(outline.devices);
  outline.static_device = data.at("static_device");
  outline.max_tokens = file.max_context;
  outline.pattern = pattern_of(data.at("pattern"), file.calls.size());
  outline.scratch = {data.at("blocks").get<std::vector<int32_t>>(), data.at("groups")};
  check_places(outline.scratch.blocks, file.calls.size(), "a block is no call");
  check_calls(outline.pattern.body, outline.scratch.blocks);
  check_calls(outline.pattern.last, outline.scratch.blocks);
  for (const Call& call : file.calls) {
    const Segment& segment = file.segments[call.segment];
    const auto device =
        std::ranges::find(outline.devices, segment.device) - outline.devices.begin();
    require(static_cast<size_t>(device) < outline.devices.size(),
            "a segment's device has no costs");
    outline.calls.push_back({call.segment, static_cast<int>(device),
                             segment.is_static && !segment.each_row, call.last_row});
  }
  return outline;
}

scheduling::Machine machine_of(const Json& data, size_t devices) {
  scheduling::Machine machine;
  for (const Json& item : list_in(data, "segments")) {
    machine.costs.segments.push_back(times_of(item));
  }
  data.at("hand_over_ns").get_to(machine.costs.hand_over_ns);
  machine.costs.same_worker_ns = data.at("same_worker_ns");
  data.at("contention").get_to(machine.costs.contention);
  check_costs(machine.costs, devices);
  data.at("most_tasks").get_to(machine.most_tasks);
  require(machine.most_tasks.size() == devices, "its costs do not fit its devices");
  machine.overlapping = data.at("overlapping");
  machine.threads = data.at("threads");
  for (const Json& item : list_in(data, "decisions")) {
    machine.decisions.push_back({item.at("tokens"), item});
  }
  return machine;
}

std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// A file that is sealed ends with the digest of all before it (src/doubleweave/ir/seal.py). It is
// compared before anything of the file is read.
void check_seal(std::string_view text) {
  constexpr std::string_view kBefore = ",\n \"seal\": \"";
  const size_t place = text.rfind(kBefore);
  require(place != std::string_view::npos, "it is of another version, or truncated");
  const std::string_view sealed = text.substr(0, place);
  require(text.substr(place) == std::string(kBefore) + digest_text(sealed) + "\"\n}\n",
          "its seal is of another text");
}

std::vector<uint64_t> digests_of(const Json& data, int64_t program_bytes) {
  std::vector<uint64_t> digests;
  for (const Json& item : data) {
    const auto& text = item.get_ref<const std::string&>();
    uint64_t& digest = digests.emplace_back();
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), digest, 16);
    require(error == std::errc() && text.size() == 16 && end == text.data() + 16,
            "a digest is no digest");
  }
  constexpr auto kChunk = static_cast<int64_t>(kDigestChunkBytes);
  require(program_bytes > 0 && program_bytes / kChunk + (program_bytes % kChunk != 0) ==
                                   static_cast<int64_t>(digests.size()),
          "the program has another number of digests");
  return digests;
}

RunFile parse(const Json& data) {
  require(data.at("format") == "doubleweave-run", "it is no run file");
  require(data.at("version") == kVersion, "it is of another version");
  RunFile file{};
  file.name = data.at("name");
  file.program_bytes = data.at("program_bytes");
  file.program_sha256 = data.at("program_sha256");
  require(file.program_sha256.size() == 64 &&
              file.program_sha256.find_first_not_of("0123456789abcdef") == std::string::npos,
          "the program's SHA-256 is none");
  file.weight_bytes = data.at("weight_bytes");
  file.program_digests = digests_of(list_in(data, "program_digests"), file.program_bytes);
  data.at("tokenizer_digest").get_to(file.tokenizer_digest);
  file.vocab_size = data.at("vocab_size");
  file.max_context = data.at("max_context");
  file.rotary_border = data.at("rotary_border");
  data.at("eos_token_ids").get_to(file.eos_token_ids);
  const Json& chat = data.at("chat");
  file.has_template = chat.is_object() || chat.get<bool>();
  if (chat.is_object()) {
    file.chat = chat.get<Chat>();
  }
  Names values;
  for (const Json& row : list_in(data, "values")) {
    if (kind_of(row.at(1)) == Kind::kEncoded) {
      throw HasEncoder();
    }
    values[row.at(0)] = static_cast<int>(file.values.size());
    file.values.push_back({row.at(0), kind_of(row.at(1)), row.at(2), row.at(3)});
  }
  Names segments;
  for (const Json& item : list_in(data, "segments")) {
    segments[item.at("name")] = static_cast<int>(file.segments.size());
    file.segments.push_back({item.at("name"), item.at("device"), item.at("is_static"),
                             item.at("per_worker"), item.at("loads_alone"), item.at("group"),
                             item.at("each_row"), item.at("weight_bytes"),
                             shapes_of(item.at("inputs")), shapes_of(item.at("outputs"))});
  }
  for (const Json& item : list_in(data, "calls")) {
    Call call{item.at("name"),
              index_of(segments, item.at("segment"), "segment"),
              {},
              {},
              item.at("last_row")};
    for (const Json& name : list_in(item, "reads")) {
      call.reads.push_back(index_of(values, name, "value"));
    }
    for (const Json& name : list_in(item, "writes")) {
      call.writes.push_back(index_of(values, name, "value"));
    }
    const Segment& segment = file.segments[call.segment];
    require(
        call.reads.size() == segment.inputs.size() && call.writes.size() == segment.outputs.size(),
        "a call does not fit its segment");
    for (const int value : call.writes) {
      require(file.values[value].kind != Kind::kState ||
                  (segment.each_row && std::ranges::find(call.reads, value) != call.reads.end()),
              "a state is written by no recurrence");
    }
    file.calls.push_back(std::move(call));
  }
  file.slot_of.assign(file.values.size(), -1);
  data.at("slot_row_bytes").get_to(file.slot_row_bytes);
  for (const auto& [name, slot] : data.at("slots").items()) {
    file.slot_of[index_of(values, name, "value")] = slot;
    check_places({slot.get<int>()}, file.slot_row_bytes.size(), "a value is in no slot");
  }
  for (size_t value = 0; value < file.values.size(); ++value) {
    require(file.values[value].kind != Kind::kChunk || file.slot_of[value] >= 0,
            "a value of a chunk is in no slot");
  }
  file.output = index_of(values, data.at("output"), "value");
  file.outline = outline_of(data, file);
  file.machine = machine_of(data, file.outline.devices.size());
  check_ranges(file);
  return file;
}

}  // namespace

RunFile read_run_file(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "run.json";
  std::ifstream stream(path, std::ios::binary);
  require(stream.is_open(), folder.string(),
          ": has no run.json; expected a folder made by doubleweave compile "
          "(of a language model), or write it with: doubleweave prepare ",
          folder.string());
  try {
    const std::string text(std::istreambuf_iterator<char>(stream), {});
    check_seal(text);
    return parse(Json::parse(text));
  } catch (const HasEncoder&) {
    throw Error(
        folder.string() +
        ": its model has an encoder, which doubleweave-run does not run; run it from Python "
        "with doubleweave.open");
  } catch (const std::exception& error) {
    std::string reason = error.what();
    reason = reason.substr(0, std::min(reason.find('\n'), size_t{200}));
    throw Error(path.string() + ": is damaged (" + reason +
                "); write it again with: doubleweave prepare " + folder.string());
  }
}

void check_tokenizer(const std::filesystem::path& path, const RunFile& file) {
  const std::string found = digest_text(bytes_of(path));
  require(!std::filesystem::exists(path) || found == file.tokenizer_digest, path.string(),
          ": its digest is ", found, ", run.json says '", file.tokenizer_digest,
          "': the file was changed or damaged; compile the program again");
}

}  // namespace doubleweave::runner

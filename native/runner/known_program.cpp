#include "known_program.h"

#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "doubleweave/error.h"
#include "doubleweave/file_state.h"
#include "doubleweave/sha256.h"

namespace doubleweave::runner {

namespace {

namespace fs = std::filesystem;
using State = std::vector<uint64_t>;
using States = std::vector<State>;

// As in ir/known_files.py.
constexpr uint64_t kLeastBytes = uint64_t{64} << 20;
constexpr size_t kMostFiles = 16;
constexpr uint64_t kTickNs = 2'000'000'000;

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// As in ir/cache_folder.py; "" for none.
fs::path cache_folder() {
  const std::string named = variable("DOUBLEWEAVE_CACHE");
  if (!named.empty()) {
    return named == "off" ? "" : named;
  }
  if (const std::string all = variable("XDG_CACHE_HOME"); !all.empty()) {
    return fs::path(all) / "doubleweave";
  }
  fs::path home = variable("HOME");
  if (const passwd* const user = getpwuid(getuid()); home.empty() && user != nullptr) {
    home = user->pw_dir;
  }
  return home.empty() ? "" : home / ".cache" / "doubleweave";
}

// The states that files with the digest were seen in.
States states_in(const fs::path& record) {
  try {
    return nlohmann::json::parse(std::ifstream(record)).get<States>();
  } catch (const nlohmann::json::exception&) {
    return {};
  }
}

// Where the record cannot be written nothing happens.
void note(const fs::path& record, const State& state) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto now_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  if (state.empty() || state[0] < kLeastBytes ||
      static_cast<uint64_t>(now_ns) < state[2] + kTickNs) {
    return;
  }
  States states = states_in(record);
  std::erase_if(states, [&](const State& other) {
    return other.size() != state.size() || std::equal(other.begin() + 3, other.end(), &state[3]);
  });
  states.insert(states.begin(), state);
  states.resize(std::min(states.size(), kMostFiles));
  std::error_code code;
  fs::create_directories(record.parent_path(), code);
  const fs::path temporary = record.parent_path() / ("." + record.stem().string() + ".part.json");
  if (std::ofstream stream(temporary); !(stream << nlohmann::json(states) << std::flush)) {
    return;
  }
  fs::rename(temporary, record, code);
}

std::string sha256_of(const fs::path& path) {
  std::vector<char> block(size_t{1} << 20);
  std::ifstream stream(path, std::ios::binary);
  Sha256 hash;
  do {
    stream.read(block.data(), static_cast<std::streamsize>(block.size()));
    hash.add(block.data(), static_cast<size_t>(stream.gcount()));
  } while (stream);
  require(stream.eof(), path.string(), ": cannot be read; compile the program again");
  return hash.finish();
}

}  // namespace

PackedWeights packed_weights(const fs::path& program, const RunFile& file) {
  const fs::path cache = cache_folder();
  PackedWeights packed(cache, file.program_sha256, file.name, file.weight_bytes);
  const State state = file_state(program);
  const fs::path record = cache / "known" / (file.program_sha256 + ".json");
  const States known = packed.keeps_any() ? states_in(record) : States();
  if (!packed.keeps_any() || std::ranges::find(known, state) != known.end()) {
    return packed;
  }
  const std::string found = sha256_of(program);
  require(found == file.program_sha256, program.string(), ": its SHA-256 is ", found.substr(0, 12),
          "…, run.json says ", file.program_sha256.substr(0, 12),
          "…: the file was changed or damaged; compile it again");
  note(record, state);
  return packed;
}

}  // namespace doubleweave::runner

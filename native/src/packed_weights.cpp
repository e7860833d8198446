#include "doubleweave/packed_weights.h"

#include <executorch/runtime/backend/interface.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>

#include "doubleweave/digest.h"
#include "doubleweave/error.h"
#include "doubleweave/file_state.h"

namespace doubleweave {

namespace fs = std::filesystem;

namespace {

constexpr uint64_t kLeastOfAMethod = uint64_t{1} << 20;
constexpr size_t kLongestPath = 255;  // XNNPACK's delegate cuts longer ones
const char* const kAbout = "about.txt";
// Behind a method's name; a name has no space in it (program.cpp).
const char* const kLock = " lock";
const char* const kWhole = " whole";

std::string content_of(const fs::path& path) {
  std::ostringstream content;
  content << std::ifstream(path, std::ios::binary).rdbuf();
  return content.str();
}

// Held until it goes, or until the process ends, however it does.
class Lock {
 public:
  explicit Lock(const fs::path& path)
      : file_(open(path.c_str(), O_RDONLY | O_CREAT | O_CLOEXEC, 0600)),
        is_held_(file_ >= 0 && flock(file_, LOCK_EX | LOCK_NB) == 0) {}
  ~Lock() {
    if (file_ >= 0) {
      close(file_);
    }
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

  bool is_held() const { return is_held_; }

 private:
  int file_;
  bool is_held_;
};

// The library that XNNPACK's code is in, or the program where it is linked into that.
std::string library_of_xnnpack() {
  const auto* backend = executorch::runtime::get_backend_class("XnnpackBackend");
  if (backend == nullptr) {
    return "";
  }
  // An object begins with the address of its class's table, which lies in the library of the class.
  const auto place = *reinterpret_cast<const uintptr_t*>(backend);
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0;
    unsigned long end = 0;
    const bool is_range = std::sscanf(line.c_str(), "%lx-%lx", &begin, &end) == 2;
    if (const size_t path = line.find('/');
        is_range && place >= begin && place < end && path != std::string::npos) {
      return line.substr(path);
    }
  }
  return "";
}

// Of what the layout depends on: XNNPACK's code and the processor; "" where they are not known.
std::string machine() {
  const std::string code = content_of(library_of_xnnpack());
  std::set<std::string> parts{digest_text(code)};
  std::ifstream cores("/proc/cpuinfo");
  for (std::string line; std::getline(cores, line);) {
    for (const char* const key : {"model name", "flags", "Features", "CPU part"}) {
      if (line.starts_with(key)) {
        parts.insert(line);
      }
    }
  }
  std::string all;
  for (const std::string& part : parts) {
    all += part + "\n";
  }
  return code.empty() ? "" : digest_text(all);
}

fs::path root_of(const fs::path& cache) {
  // Absolute, and without links: locks are found by the path that the system knows a file by
  // (release_locks in program.cpp).
  std::error_code code;
  const fs::path found = fs::weakly_canonical(cache, code);
  return code || cache.empty() ? fs::path() : found / "packed";
}

fs::path beside(const fs::path& path, const char* suffix) { return path.string() + suffix; }

// What says that a file was written to its end: the state that it had then.
std::string note_of(const fs::path& path) {
  std::string note;
  for (const uint64_t part : file_state(path)) {
    note += std::to_string(part) + "\n";
  }
  return note;
}

bool is_whole(const fs::path& path) {
  const std::string note = note_of(path);
  return !note.empty() && content_of(beside(path, kWhole)) == note;
}

// XNNPACK has written the file's index, and waited for the disk.
void note_whole(const fs::path& path) {
  std::error_code code;
  if (!fs::exists(path, code)) {
    return;  // the method has nothing that is packed
  }
  fs::permissions(path, fs::perms::owner_read | fs::perms::group_read | fs::perms::others_read,
                  code);
  const fs::path temporary = beside(path, " part");
  if (std::ofstream stream(temporary); !(stream << note_of(path) << std::flush)) {
    return;
  }
  fs::rename(temporary, beside(path, kWhole), code);
}

// None where the folder cannot be read; other processes may remove what is in it meanwhile.
std::vector<fs::path> entries_of(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code code;
  for (fs::directory_iterator at(folder, code), end; !code && at != end; at.increment(code)) {
    found.push_back(at->path());
  }
  return found;
}

uint64_t bytes_of(const fs::path& folder) {
  uint64_t bytes = 0;
  for (const fs::path& path : entries_of(folder)) {
    std::error_code code;
    const uint64_t size = fs::file_size(path, code);
    bytes += code ? 0 : size;
  }
  return bytes;
}

}  // namespace

PackedWeights::PackedWeights(const fs::path& cache, const std::string& sha256,
                             const std::string& name, uint64_t weight_bytes) {
  if (cache.empty() || weight_bytes < kLeastBytes || weight_bytes > kMostBytes) {
    return;
  }
  const std::string layout = machine();
  const fs::path root = root_of(cache);
  if (layout.empty() || root.empty()) {
    return;
  }
  const fs::path folder = root / (sha256.substr(0, 32) + "-" + layout);
  std::error_code code;
  if (!fs::is_directory(folder, code)) {
    if (fs::create_directories(root, code); code) {
      return;
    }
    remove_kept_weights(cache, kMostBytes - weight_bytes);
    if (const uint64_t free = fs::space(root, code).available; code || free / 2 <= weight_bytes) {
      return;
    }
    if (fs::create_directory(folder, code); code) {
      return;
    }
    std::ofstream(folder / kAbout) << name;
  }
  if (utimensat(AT_FDCWD, folder.c_str(), nullptr, 0) == 0) {  // used now
    folder_ = folder;
  }
}

std::unique_ptr<Instance> PackedWeights::load(const Program& program, const std::string& method,
                                              int workspace_group, uint64_t weight_bytes) const {
  const fs::path path = folder_ / method;
  if (!keeps_any() || weight_bytes < kLeastOfAMethod || path.string().size() > kLongestPath ||
      method.find('/') != std::string::npos) {
    return program.load(method, workspace_group);
  }
  if (is_whole(path)) {
    return program.load(method, workspace_group, path.string());
  }
  const Lock lock(beside(path, kLock));
  if (!lock.is_held()) {
    return program.load(method, workspace_group);
  }
  // Another process may have written it between the look at it and the lock.
  if (!is_whole(path)) {
    std::error_code code;
    fs::remove(path, code);
  }
  auto instance = program.load(method, workspace_group, path.string());
  note_whole(path);
  return instance;
}

std::vector<KeptWeights> kept_weights(const fs::path& cache) {
  std::vector<KeptWeights> found;
  for (const fs::path& folder : entries_of(root_of(cache))) {
    struct stat status{};
    if (stat(folder.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
      continue;
    }
    const std::string name = content_of(folder / kAbout);
    const double used = static_cast<double>(status.st_mtim.tv_sec) +
                        1e-9 * static_cast<double>(status.st_mtim.tv_nsec);
    found.push_back({name.empty() ? "?" : name, bytes_of(folder), used, folder});
  }
  std::ranges::sort(found, {}, &KeptWeights::used);
  return found;
}

uint64_t remove_kept_weights(const fs::path& cache, uint64_t most_bytes) {
  const std::vector<KeptWeights> found = kept_weights(cache);
  uint64_t total = 0;
  for (const KeptWeights& each : found) {
    total += each.bytes;
  }
  uint64_t removed = 0;
  for (const KeptWeights& each : found) {
    if (total <= most_bytes) {
      break;
    }
    std::error_code code;
    fs::remove_all(each.folder, code);
    total -= each.bytes;
    removed += each.bytes;
  }
  return removed;
}

}  // namespace doubleweave

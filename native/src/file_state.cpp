#include "doubleweave/file_state.h"

#include <sys/stat.h>

namespace doubleweave {

std::vector<uint64_t> file_state(const std::string& path) {
  struct stat found{};
  if (stat(path.c_str(), &found) != 0) {
    return {};
  }
  const auto nanoseconds = [](const timespec& time) {
    return static_cast<uint64_t>(time.tv_sec * 1'000'000'000LL + time.tv_nsec);
  };
  return {static_cast<uint64_t>(found.st_size), nanoseconds(found.st_mtim),
          nanoseconds(found.st_ctim), found.st_ino, found.st_dev};
}

}  // namespace doubleweave

// What changes when somebody writes a file, by which one is known again without reading it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace doubleweave {

/// The file's size, times of its last change of content and of anything (ns since 1970), and place
/// (inode and device); empty where it cannot be seen. As src/doubleweave/ir/cache_folder.py has it.
std::vector<uint64_t> file_state(const std::string& path);

}  // namespace doubleweave

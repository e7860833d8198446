// Copies of blocks between regions, with zeros behind each where rows are missing, checked before
// the first run.
#pragma once

#include "doubleweave/execution.h"

namespace doubleweave {

/// Throws Error naming `name` when the copy leaves its regions, writes a byte twice, or reads and
/// writes overlapping parts of one region.
void check_copy(const BlockCopy& copy, const std::vector<Region>& regions, const std::string& name);

/// Runs a checked copy; `starts` says where each region lies.
void copy_blocks(const BlockCopy& copy, const std::vector<std::byte*>& starts);

}  // namespace doubleweave

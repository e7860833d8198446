// A run as Chrome trace events (ui.perfetto.dev), in the form that `doubleweave trace` reads back.
#pragma once

#include <filesystem>

#include "session.h"

namespace doubleweave::runner {

/// Throws Error unless the file could be written: a name that ends in .json, in a folder that
/// exists.
void check_trace_path(const std::filesystem::path& path);

/// Writes the run of `prepared`, in one piece. Throws Error where the file cannot be written.
void write_trace(const std::filesystem::path& path, const RunFile& file, const Prepared& prepared,
                 const Timeline& timeline);

}  // namespace doubleweave::runner

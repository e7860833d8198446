// Whether a folder's program file is the one of a SHA-256, which costs nothing where that was found
// before: the counterpart of the Python package's ir/known_files.py, over the same records.
#pragma once

#include <filesystem>

#include "doubleweave/packed_weights.h"
#include "run_file.h"

namespace doubleweave::runner {

/// The packed weights of a program file, kept in $DOUBLEWEAVE_CACHE, or `doubleweave` in the user's
/// cache folder. Those of a program are used for its file alone: its SHA-256 is computed, unless it
/// was before and the file was not written since. Throws Error for another one than run.json says.
PackedWeights packed_weights(const std::filesystem::path& program, const RunFile& file);

}  // namespace doubleweave::runner

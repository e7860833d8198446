// Our own operators, as ExecuTorch kernels.
#pragma once

namespace doubleweave {

/// Makes `doubleweave::attention.out` and `doubleweave::rotary.out` known to ExecuTorch, once per
/// process.
void register_operators();

}  // namespace doubleweave

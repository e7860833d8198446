// Our own operators, as ExecuTorch kernels.
#pragma once

namespace doubleweave {

/// Makes our kernels known to ExecuTorch, once per process: `doubleweave::attention.out`,
/// `doubleweave::rotary.out`, those of linears, experts, tables and caches.
void register_operators();

/// `doubleweave::linear_packed.out`, `doubleweave::expert_linear_packed.out` and
/// `doubleweave::expert_sum.out`; register_operators calls it.
void register_linear_operators();

/// `doubleweave::table_rows.out`; register_operators calls it.
void register_table_operators();

/// `doubleweave::cache_rows.out`; register_operators calls it.
void register_cache_operators();

}  // namespace doubleweave

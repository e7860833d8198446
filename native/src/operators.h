// Our own operators, as ExecuTorch kernels.
#pragma once

namespace doubleweave {

/// Makes our kernels known to ExecuTorch, once per process: `doubleweave::attention.out`,
/// `doubleweave::rotary.out`, those of linears, experts, tables and caches.
void register_operators();

/// `doubleweave::pack_rows.out`, `linear_packed.out`, `expert_linear_packed.out`, `expert_sum.out`
/// and `table_rows_packed.out`; register_operators calls it.
void register_linear_operators();

/// `doubleweave::table_rows.out`; register_operators calls it.
void register_table_operators();

/// `doubleweave::cache_rows.out`; register_operators calls it.
void register_cache_operators();

}  // namespace doubleweave

// Scaled dot-product attention over a token-major KV cache, in float32.
//
// The work divides into independent items, so a caller that owns threads runs items on them in any
// order; a caller that owns none calls `attention`. Nothing here starts a thread. Every function
// may be called from several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace doubleweave {

struct AttentionParams {
  int64_t num_queries;   // T: rows of q and out
  int64_t num_keys;      // S; causal: S >= T, and query i sits at absolute position S - T + i
  int64_t num_heads;     // H
  int64_t num_kv_heads;  // Hkv divides H; head h reads kv head h / (H / Hkv)
  int64_t head_dim;      // D, of q and k
  int64_t value_dim;     // Dv, of v and out
  float scale;           // a score is scale * dot(q, k)
  int64_t window;        // 0: none; else a query at p sees the keys in (p - window, p]
  float soft_cap;        // 0: none; else a score s becomes soft_cap * tanh(s / soft_cap)
  bool causal;           // false: every query sees every key; window and block are ignored
  // The rest is left out where a model has no such thing.
  int64_t block = 0;  // 0: none; else a query at p sees no key before p / block * block
  // [H], or null: a score that each head adds to its queries' keys, for which there is no value, so
  // that a query may attend to nothing ("attention sinks"). The soft cap leaves it as it is.
  const float* sinks = nullptr;
  // [H], or null: slope * (key - p) is added to a score, behind the soft cap (ALiBi: Press et al.,
  // "Train Short, Test Long", 2021).
  const float* slopes = nullptr;
  // [H, num_distances], or null: what is added to the score of a key so many tokens behind p,
  // behind the soft cap; keys that are further away have the last number (T5's relative positions).
  const float* distances = nullptr;
  int64_t num_distances = 0;
};

// The number of independent pieces: at least one for each kv head. Pieces differ in cost; the
// dearest have the lowest indices, so handing them out in order balances threads.
size_t attention_num_work_items(const AttentionParams& params);

// Computes one piece. All tensors are contiguous float32, of any alignment of a float:
// q [T, H, D], k [S, Hkv, D], v [S, Hkv, Dv], out [T, H, Dv]; out must overlap none of the others.
// Scratch memory is kept per thread, and is small: it grows with the head size, not with T or S.
void attention_work_item(const AttentionParams& params, const float* q, const float* k,
                         const float* v, float* out, size_t item);

// Computes every piece on this thread.
void attention(const AttentionParams& params, const float* q, const float* k, const float* v,
               float* out);

// The instruction sets that the kernel is compiled for. The best one that this machine has is
// chosen at the first use; the environment variable DOUBLEWEAVE_ATTENTION_ISA (a name as below)
// overrides it.
enum class Isa { kBaseline, kAvx2, kAvx512, kNeon };

const char* isa_name(Isa isa);  // "baseline", "avx2", "avx512", "neon"

Isa attention_isa();  // the one in use

// Chooses another, for tests; false (and no change) if this build or this machine lacks it. An item
// number belongs to the instruction set it was counted under: do not change it between the two.
bool set_attention_isa(Isa isa);

}  // namespace doubleweave

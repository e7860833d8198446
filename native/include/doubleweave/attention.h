// Scaled dot-product attention over a token-major KV cache. Queries and results are float32; keys
// and values are of a format of the cache (cache_format.h). Sums are float32 and products exact,
// but where the instruction set multiplies pairs of bfloat16 and the format has no more digits than
// those: then queries and the softmax's weights are rounded to bfloat16.
//
// The work divides into independent items, which a caller that owns threads runs on them. Nothing
// here starts a thread. Every function may be called from several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "doubleweave/cache_format.h"

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
  CacheFormat format = CacheFormat::kFloat32;  // of k and v
};

// Runs function(context, item) for every item in [0, num_items), in any order, and returns when all
// are done: `parallel_items` of threads.h, or `in_turn`.
using RunItems = void (*)(size_t num_items, void (*function)(void*, size_t), void* context);

void in_turn(size_t num_items, void (*function)(void*, size_t), void* context);

// All tensors are contiguous: q [T, H, D] and out [T, H, Dv] float32, of any alignment of a float,
// k [S, Hkv, D] and v [S, Hkv, Dv] rows of the cache's format, of any alignment of its numbers; out
// must overlap none of the others. The items do not depend on how they are run, so neither does the
// result. Scratch memory is kept per thread, and is small: it grows with the head size, and for
// single tokens by a row of out for half a megabyte of keys and values.
void attention(const AttentionParams& params, const float* q, const void* k, const void* v,
               float* out, RunItems run = in_turn);

// The instruction sets that the kernel is compiled for. The best one that this machine has is
// chosen at the first use; the environment variable DOUBLEWEAVE_ATTENTION_ISA (a name as below)
// overrides it.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kNeon, kNeonBf16 };

constexpr Isa kIsas[] = {Isa::kBaseline,   Isa::kAvx2, Isa::kAvx512,
                         Isa::kAvx512Bf16, Isa::kNeon, Isa::kNeonBf16};

const char* isa_name(Isa isa);  // "baseline", "avx2", "avx512", "avx512bf16", "neon", "neonbf16"

// Whether this instruction set rounds queries and weights to bfloat16 over a cache of this format.
bool rounds_to_bfloat16(Isa isa, CacheFormat format);

Isa attention_isa();  // the one in use

// Chooses another, for tests; false (and no change) if this build or this machine lacks it.
bool set_attention_isa(Isa isa);

}  // namespace doubleweave

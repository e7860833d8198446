// Chooses the compilation of the attention kernel that suits this machine, and cuts calls into
// items.
#include "doubleweave/attention.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "attention_kernel.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace doubleweave {
namespace {

// Best first. A kernel is here if this build has it; whether the machine has it is asked below.
const AttentionKernel* const kKernels[] = {
#if defined(__x86_64__)
    &avx512bf16::kKernel,
    &avx512::kKernel,
    &avx2::kKernel,
#elif defined(__aarch64__)
    &neonbf16::kKernel,
    &neon::kKernel,
#endif
    &baseline::kKernel,
};

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // for callers that run before main
#endif
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return machine_has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("fma");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#elif defined(__aarch64__)
    case Isa::kNeonBf16:
      return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
    case Isa::kNeon:
      return true;
#endif
    default:
      return isa == Isa::kBaseline;
  }
}

const AttentionKernel* best_kernel() {
  const char* wanted = std::getenv("DOUBLEWEAVE_ATTENTION_ISA");
  for (const AttentionKernel* kernel : kKernels) {
    const bool named = wanted == nullptr || std::strcmp(wanted, isa_name(kernel->isa)) == 0;
    if (named && machine_has(kernel->isa)) return kernel;
  }
  // A name that is unknown or not for this machine changes nothing but the speed.
  return &baseline::kKernel;
}

std::atomic<const AttentionKernel*>& current_kernel() {
  static std::atomic<const AttentionKernel*> kernel{best_kernel()};
  return kernel;
}

// A cache line, and the widest vector.
constexpr std::align_val_t kScratchAlignment{64};

struct FreeScratch {
  void operator()(float* p) const { ::operator delete[](p, kScratchAlignment); }
};

// This thread's scratch memory. What it held before is lost when it grows.
float* scratch(size_t num_floats) {
  thread_local std::unique_ptr<float[], FreeScratch> memory;
  thread_local size_t capacity = 0;
  if (capacity < num_floats) {
    memory.reset(new (kScratchAlignment) float[num_floats]);
    capacity = num_floats;
  }
  return memory.get();
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline",   "avx2", "avx512",
                                    "avx512bf16", "neon", "neonbf16"};  // as in Isa
  return kNames[static_cast<size_t>(isa)];
}

Isa attention_isa() { return current_kernel().load()->isa; }

bool set_attention_isa(Isa isa) {
  for (const AttentionKernel* kernel : kKernels) {
    if (kernel->isa == isa && machine_has(isa)) {
      current_kernel().store(kernel);
      return true;
    }
  }
  return false;
}

bool rounds_to_bfloat16(Isa isa, CacheFormat format) {
  for (const AttentionKernel* kernel : kKernels) {
    if (kernel->isa == isa) return kernel->rounds_to_bfloat16(format);
  }
  return false;
}

size_t attention_num_work_items(const AttentionParams& params) {
  const AttentionKernel& kernel = *current_kernel().load();
  return static_cast<size_t>(params.num_kv_heads * kernel.num_row_blocks(params));
}

void attention_work_item(const AttentionParams& params, const float* q, const void* k,
                         const void* v, float* out, size_t item) {
  const AttentionKernel& kernel = *current_kernel().load();
  // Later rows see more keys, so they come first.
  const int64_t blocks = kernel.num_row_blocks(params);
  const int64_t row_block = blocks - 1 - static_cast<int64_t>(item) / params.num_kv_heads;
  const int64_t kv_head = static_cast<int64_t>(item) % params.num_kv_heads;
  const auto num_floats = static_cast<size_t>(kernel.num_scratch_floats(params));
  kernel.run(params,
             {q, static_cast<const std::byte*>(k), static_cast<const std::byte*>(v), out,
              scratch(num_floats)},
             kv_head, row_block);
}

void attention(const AttentionParams& params, const float* q, const void* k, const void* v,
               float* out) {
  // Head by head, so that the keys and values of one stay in the cache.
  const size_t num_items = attention_num_work_items(params);
  const auto num_kv_heads = static_cast<size_t>(params.num_kv_heads);
  for (size_t head = 0; head < num_kv_heads; ++head) {
    for (size_t item = head; item < num_items; item += num_kv_heads) {
      attention_work_item(params, q, k, v, out, item);
    }
  }
}

}  // namespace doubleweave

// Chooses the compilation of the attention kernel that suits this machine, and cuts calls into
// items.
#include "doubleweave/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
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

class Scratch {
 public:
  // What it held before is lost when it grows.
  float* floats(size_t count) {
    if (capacity_ < count) {
      memory_.reset(new (kScratchAlignment) float[count]);
      capacity_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float[], FreeScratch> memory_;
  size_t capacity_ = 0;
};

// A call: what its items read.
struct Attention {
  const AttentionKernel& kernel;
  const AttentionParams& params;
  AttentionInputs inputs;  // without scratch, which each thread has its own

  AttentionInputs on_this_thread() const {
    thread_local Scratch scratch;
    AttentionInputs found = inputs;
    found.scratch = scratch.floats(static_cast<size_t>(kernel.num_scratch_floats(params)));
    return found;
  }
};

template <typename Function>
void run_items(RunItems run, int64_t num_items, Function function) {
  run(
      static_cast<size_t>(num_items),
      [](void* pointer, size_t item) {
        (*static_cast<Function*>(pointer))(static_cast<int64_t>(item));
      },
      &function);
}

void attend_in_row_blocks(const Attention& call, RunItems run) {
  const int64_t blocks = call.kernel.num_row_blocks(call.params);
  const int64_t heads = call.params.num_kv_heads;
  run_items(run, heads * blocks, [&](int64_t item) {
    // Later rows see more keys, so they come first: handed out in order, items balance threads.
    call.kernel.run(call.params, call.on_this_thread(), item % heads, blocks - 1 - item / heads);
  });
}

// Of one row: from its results over each range of keys, a `stride` apart, to that over all of them.
void merge_ranges(const float* partial, int64_t num_ranges, int64_t stride, int64_t value_dim,
                  float* out) {
  float largest = partial[value_dim];
  for (int64_t range = 1; range < num_ranges; ++range) {
    largest = std::max(largest, partial[range * stride + value_dim]);
  }
  float total = 0;
  std::fill_n(out, value_dim, 0.0f);
  for (int64_t range = 0; range < num_ranges; ++range) {
    const float* found = partial + range * stride;
    const float factor = std::exp2(found[value_dim] - largest);
    total += found[value_dim + 1] * factor;
    for (int64_t i = 0; i < value_dim; ++i) out[i] += found[i] * factor;
  }
  for (int64_t i = 0; i < value_dim; ++i) out[i] /= total;
}

void attend_in_key_ranges(const Attention& call, int64_t num_ranges, RunItems run) {
  thread_local Scratch scratch;
  const int64_t rows = call.params.num_queries * call.params.num_heads;
  const int64_t dim = call.params.value_dim;
  const int64_t stride = rows * (dim + 2);
  float* partial = scratch.floats(static_cast<size_t>(num_ranges * stride));
  run_items(run, num_ranges, [&](int64_t range) {
    AttentionInputs inputs = call.on_this_thread();
    inputs.out = partial + range * stride;
    call.kernel.run_range(call.params, inputs, range, num_ranges);
  });
  for (int64_t row = 0; row < rows; ++row) {
    merge_ranges(partial + row * (dim + 2), num_ranges, stride, dim, call.inputs.out + row * dim);
  }
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

void in_turn(size_t num_items, void (*function)(void*, size_t), void* context) {
  for (size_t item = 0; item < num_items; ++item) function(context, item);
}

void attention(const AttentionParams& params, const float* q, const void* k, const void* v,
               float* out, RunItems run) {
  const AttentionKernel& kernel = *current_kernel().load();
  const auto* keys = static_cast<const std::byte*>(k);
  const auto* values = static_cast<const std::byte*>(v);
  const Attention call = {kernel, params, {q, keys, values, out, nullptr}};
  if (const int64_t num_ranges = kernel.num_key_ranges(params)) {
    return attend_in_key_ranges(call, num_ranges, run);
  }
  attend_in_row_blocks(call, run);
}

}  // namespace doubleweave

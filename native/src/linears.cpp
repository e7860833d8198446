// Sorts rows by expert, and chooses the compilation of the kernel that suits this machine.
#include "doubleweave/linears.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "doubleweave/threads.h"
#include "linears_kernel.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace doubleweave {
namespace {

std::vector<const LinearKernel*> kernels_here() {
  std::vector<const LinearKernel*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();  // for callers that run before main
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && avx2) found.push_back(&linears_avx512vnni::kKernel);
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&linears_avxvnni::kKernel);
  if (avx2) found.push_back(&linears_avx2::kKernel);
#elif defined(__aarch64__)
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) found.push_back(&linears_neondot::kKernel);
  found.push_back(&linears_neon::kKernel);
#endif
  found.push_back(&linears_baseline::kKernel);
  found.push_back(nullptr);
  return found;
}

std::atomic<const LinearKernel*>& current_kernel() {
  static std::atomic<const LinearKernel*> kernel{linear_kernels()[0]};
  return kernel;
}

// What a call needs, kept by the thread that makes it.
struct Scratch {
  std::vector<uint8_t> rows;
  std::vector<float> scales;
  std::vector<float> zeros;
  std::vector<int32_t> sums;
  std::vector<int16_t> group_sums;
  std::vector<int64_t> begins;   // of each expert's entries
  std::vector<int32_t> entries;  // places in index, sorted by expert
  std::vector<int32_t> used;     // experts that some row chose
};

template <typename T>
void make_room(std::vector<T>& v, int64_t size) {
  if (v.size() < static_cast<size_t>(size)) v.resize(static_cast<size_t>(size));
}

void sort_by_expert(const ExpertRows& rows, int64_t num_experts, Scratch& s) {
  const int64_t num_entries = rows.num_rows * rows.num_choices;
  s.begins.assign(static_cast<size_t>(num_experts) + 1, 0);
  make_room(s.entries, num_entries);
  for (int64_t i = 0; i < num_entries; ++i) ++s.begins[static_cast<size_t>(rows.index[i]) + 1];
  s.used.clear();
  for (size_t e = 0; e < static_cast<size_t>(num_experts); ++e) {
    if (s.begins[e + 1] > 0) s.used.push_back(static_cast<int32_t>(e));
    s.begins[e + 1] += s.begins[e];
  }
  for (int64_t i = 0; i < num_entries; ++i) {
    s.entries[static_cast<size_t>(s.begins[static_cast<size_t>(rows.index[i])]++)] =
        static_cast<int32_t>(i);
  }
  // Each begin is now the next one's.
  s.begins.insert(s.begins.begin(), 0);
}

PackedRows pack_rows(const LinearKernel& kernel, LinearFormat format, int64_t in_features,
                     const ExpertRows& rows, Scratch& s) {
  const int64_t num_rows = rows.num_rows * (rows.has_own_rows ? rows.num_choices : 1);
  const int64_t bytes = kernel.row_bytes(in_features);
  const int64_t num_sums = linear_row_sums(format, in_features);
  make_room(s.rows, num_rows * bytes);
  make_room(s.scales, num_rows);
  make_room(s.zeros, num_rows);
  make_room(s.sums, num_rows * num_sums);
  const int64_t num_group_sums =
      format == LinearFormat::kInt4 ? 2 * linear_group_pairs(in_features) : 0;
  make_room(s.group_sums, num_rows * num_group_sums);
  const PackedRows packed = {s.rows.data(), s.scales.data(), s.zeros.data(), s.sums.data(),
                             s.group_sums.data()};
  parallel_items(static_cast<size_t>(num_rows), [&](size_t row) {
    const auto r = static_cast<int64_t>(row);
    int16_t* group_sums = packed.group_sums + r * num_group_sums;
    if (num_group_sums > 0) group_sums[num_group_sums - 1] = 0;
    kernel.pack_row(format, rows.x + r * in_features, in_features,
                    {packed.data + r * bytes, packed.scales + r, packed.zeros + r,
                     packed.sums + r * num_sums, group_sums});
  });
  return packed;
}

// Bytes of the scales of one expert's weights.
int64_t scale_bytes(const LinearWeights& w, int64_t num_blocks) {
  return w.format == LinearFormat::kInt4
             ? num_blocks * (w.in_features / kLinearGroup) * kLinearBlock * 2
             : num_blocks * kLinearBlock * 4;
}

// Blocks of one work item: their weights stay in the second cache while an expert's rows go by.
constexpr int64_t kItemBlocks = 4;
constexpr int64_t kMostAhead = int64_t{1} << 17;  // bytes

}  // namespace

const LinearKernel* const* linear_kernels() {
  static const std::vector<const LinearKernel*> kernels = kernels_here();
  return kernels.data();
}

void use_linear_kernel(const LinearKernel* kernel) {
  current_kernel().store(kernel == nullptr ? linear_kernels()[0] : kernel);
}

int64_t linear_block_bytes(LinearFormat format, int64_t in_features) {
  switch (format) {
    case LinearFormat::kFloat32:
      return in_features * kLinearBlock * 4;
    case LinearFormat::kInt8:
      return (in_features + 3) / 4 * kLinearBlock * 4;
    case LinearFormat::kInt4:
      return in_features / 8 * kLinearBlock * 4;
  }
  return 0;
}

int64_t linear_group_pairs(int64_t in_features) { return (in_features / kLinearGroup + 1) / 2; }

int64_t linear_row_sums(LinearFormat format, int64_t in_features) {
  return format == LinearFormat::kInt4 ? in_features / kLinearGroup : 1;
}

bool are_experts(const ExpertRows& rows, int64_t num_experts) {
  const int64_t* end = rows.index + rows.num_rows * rows.num_choices;
  return std::all_of(rows.index, end,
                     [&](int64_t expert) { return expert >= 0 && expert < num_experts; });
}

void expert_linear(const LinearWeights& weights, const ExpertRows& rows, float* out) {
  thread_local Scratch s;
  const LinearKernel& kernel = *current_kernel().load();
  const int64_t num_blocks = (weights.out_features + kLinearBlock - 1) / kLinearBlock;
  sort_by_expert(rows, weights.num_experts, s);
  PackedRows packed{};
  if (weights.format != LinearFormat::kFloat32) {
    packed = pack_rows(kernel, weights.format, weights.in_features, rows, s);
  }
  const Scratch& sorted = s;  // a thread_local's name is another thread's own inside the items
  const int64_t block_bytes = linear_block_bytes(weights.format, weights.in_features);
  const int64_t weight_bytes = num_blocks * block_bytes;
  const int64_t bytes_of_scales = scale_bytes(weights, num_blocks);
  const int64_t item_blocks = rows.num_rows > 1 && num_blocks < 64 ? 2 : kItemBlocks;
  const int64_t items_each = (num_blocks + item_blocks - 1) / item_blocks;
  const auto num_items = static_cast<size_t>(items_each) * sorted.used.size();
  parallel_items(num_items, [&](size_t item) {
    const auto i = static_cast<int64_t>(item);
    const int64_t expert = sorted.used[static_cast<size_t>(i / items_each)];
    const int64_t block = i % items_each * item_blocks;
    const int64_t begin = sorted.begins[static_cast<size_t>(expert)];
    LinearTile tile{};
    tile.format = weights.format;
    tile.in_features = weights.in_features;
    tile.out_features = weights.out_features;
    tile.weights = static_cast<const uint8_t*>(weights.weights) + expert * weight_bytes;
    if (weights.format != LinearFormat::kFloat32) {
      tile.scales = static_cast<const uint8_t*>(weights.scales) + expert * bytes_of_scales;
      tile.sums = weights.sums + expert * num_blocks * kLinearBlock;
    }
    if (weights.offsets != nullptr) {
      tile.offsets = weights.offsets + expert * num_blocks *
                                           linear_group_pairs(weights.in_features) * 2 *
                                           kLinearBlock;
      tile.offset_scales = weights.offset_scales + expert * num_blocks * kLinearBlock;
    }
    if (weights.bias != nullptr) tile.bias = weights.bias + expert * weights.out_features;
    tile.first_block = block;
    tile.end_block = std::min(block + item_blocks, num_blocks);
    tile.num_rows = sorted.begins[static_cast<size_t>(expert) + 1] - begin;
    tile.entries = sorted.entries.data() + begin;
    tile.num_choices = rows.has_own_rows ? 1 : static_cast<int32_t>(rows.num_choices);
    tile.x = rows.x;
    tile.packed = packed;
    tile.out = out;
    // Few rows wait for memory alone, and processors fetch ahead by themselves; a large tile would
    // drive out the one that is multiplied.
    if (item + 1 < num_items && tile.num_rows >= 4 && item_blocks * block_bytes <= kMostAhead) {
      const int64_t next_block = (i + 1) % items_each * item_blocks;
      tile.next = static_cast<const uint8_t*>(weights.weights) +
                  sorted.used[static_cast<size_t>((i + 1) / items_each)] * weight_bytes +
                  next_block * block_bytes;
      tile.next_bytes = std::min(item_blocks, num_blocks - next_block) * block_bytes;
    }
    kernel.run(tile);
  });
}

void linear(const LinearWeights& weights, const float* x, int64_t num_rows, float* out) {
  thread_local std::vector<int64_t> first;  // zeros
  make_room(first, num_rows);
  expert_linear(weights, {num_rows, 1, false, x, first.data()}, out);
}

void expert_sum(const float* x, const float* scores, float* out, int64_t num_rows,
                int64_t num_choices, int64_t width) {
  parallel_items(static_cast<size_t>(num_rows), [=](size_t row) {
    const auto r = static_cast<int64_t>(row);
    float* to = out + r * width;
    std::fill(to, to + width, 0.0f);
    for (int64_t choice = 0; choice < num_choices; ++choice) {
      const float* from = x + (r * num_choices + choice) * width;
      const float score = scores[r * num_choices + choice];
      for (int64_t i = 0; i < width; ++i) to[i] += score * from[i];
    }
  });
}

}  // namespace doubleweave

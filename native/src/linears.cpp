// Sorts rows by expert, and chooses the compilation of the kernel that suits this machine.
#include "doubleweave/linears.h"

#include <algorithm>
#include <atomic>
#include <bit>
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

// Bytes of the scales of one expert's weights.
int64_t scale_bytes(const LinearWeights& w, int64_t num_blocks) {
  const int64_t group = linear_scale_group(w.format);
  return group == 0 ? 0 : num_blocks * ((w.in_features + group - 1) / group) * kLinearBlock * 2;
}

// Blocks of one work item: their weights stay in the second cache while an expert's rows go by.
constexpr int64_t kItemBlocks = 4;
// Threads would wait for the last item where there are fewer blocks: items are smaller then.
constexpr int64_t kFewBlocks = 64;
constexpr int64_t kMostAhead = int64_t{1} << 17;  // bytes

// The products of rows, sorted by expert.
void multiply(const LinearWeights& weights, const ExpertRows& rows, const uint8_t* packed,
              const Scratch& sorted, float* out) {
  const LinearKernel& kernel = *current_kernel().load();
  const int64_t num_blocks = (weights.out_features + kLinearBlock - 1) / kLinearBlock;
  const int64_t block_bytes = linear_block_bytes(weights.format, weights.in_features);
  const int64_t weight_bytes = num_blocks * block_bytes;
  const int64_t bytes_of_scales = scale_bytes(weights, num_blocks);
  const int64_t item_blocks = rows.num_rows > 1 && num_blocks < kFewBlocks ? 2 : kItemBlocks;
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
    tile.row_bytes = linear_row_bytes(weights.in_features);
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
      return (in_features + kInt8Group - 1) / kInt8Group * kInt8Group * kLinearBlock;
    case LinearFormat::kInt4:
      return in_features / 2 * kLinearBlock;
  }
  return 0;
}

int64_t linear_scale_group(LinearFormat format) {
  return format == LinearFormat::kFloat32 ? 0
         : format == LinearFormat::kInt8  ? kInt8Group
                                          : kLinearGroup;
}

int64_t linear_group_pairs(int64_t in_features) {
  return (in_features + kInt8Group - 1) / kInt8Group;
}

int64_t linear_row_bytes(int64_t in_features) {
  constexpr int64_t kLineBytes = 64;
  const int64_t used = packed_row(linear_group_pairs(in_features)).sum_step + 4;
  return (used + kLineBytes - 1) / kLineBytes * kLineBytes;
}

void pack_rows(const RowSource& source, int64_t num_rows, int64_t in_features, uint8_t* packed) {
  const LinearKernel& kernel = *current_kernel().load();
  const int64_t row_bytes = linear_row_bytes(in_features);
  parallel_items(static_cast<size_t>(num_rows), [&](size_t row) {
    const auto r = static_cast<int64_t>(row);
    RowSource row_source = source;
    row_source.x += r * in_features;
    if (source.kind == RowKind::kSilu || source.kind == RowKind::kGelu) {
      row_source.other += r * in_features;
    }
    kernel.pack_row(row_source, in_features, packed + r * row_bytes);
  });
}

bool are_experts(const ExpertRows& rows, int64_t num_experts) {
  const int64_t* end = rows.index + rows.num_rows * rows.num_choices;
  return std::all_of(rows.index, end,
                     [&](int64_t expert) { return expert >= 0 && expert < num_experts; });
}

void expert_linear(const LinearWeights& weights, const ExpertRows& rows, float* out) {
  thread_local Scratch s;
  const uint8_t* packed = nullptr;
  if (weights.format != LinearFormat::kFloat32) {
    const int64_t num_rows = rows.num_rows * (rows.has_own_rows ? rows.num_choices : 1);
    make_room(s.rows, num_rows * linear_row_bytes(weights.in_features));
    pack_rows({RowKind::kPlain, rows.x, nullptr, 0}, num_rows, weights.in_features, s.rows.data());
    packed = s.rows.data();
  }
  sort_by_expert(rows, weights.num_experts, s);
  multiply(weights, rows, packed, s, out);
}

void linear(const LinearWeights& weights, const uint8_t* packed, int64_t num_rows, float* out) {
  thread_local Scratch s;
  thread_local std::vector<int64_t> first;  // zeros
  make_room(first, num_rows);
  const ExpertRows rows = {num_rows, 1, false, nullptr, first.data()};
  sort_by_expert(rows, 1, s);
  multiply(weights, rows, packed, s, out);
}

void read_linear_row(const LinearWeights& weights, int64_t feature, float* out) {
  const int64_t num_blocks = (weights.out_features + kLinearBlock - 1) / kLinearBlock;
  const int64_t block = feature / kLinearBlock;
  const int64_t lane = feature % kLinearBlock;
  const int64_t first = block / kLinearBundle * kLinearBundle;
  const int64_t together = std::min(kLinearBundle, num_blocks - first);
  const bool is_int4 = weights.format == LinearFormat::kInt4;
  const int64_t group_size = linear_scale_group(weights.format);
  const int64_t num_groups = (weights.in_features + group_size - 1) / group_size;
  const int64_t num_pairs = linear_group_pairs(weights.in_features);
  const int64_t group_bytes = group_size * kLinearBlock / (is_int4 ? 2 : 1);
  const auto* all = static_cast<const uint8_t*>(weights.weights);
  const auto* scales = static_cast<const uint16_t*>(weights.scales);
  for (int64_t k = 0; k < weights.in_features; ++k) {
    const int64_t group = k / group_size;
    const int64_t i = k % group_size;
    const int64_t at = first * num_groups + group * together + block - first;
    const uint32_t bits = static_cast<uint32_t>(scales[at * kLinearBlock + lane]) << 16;
    const auto scale = std::bit_cast<float>(bits);
    const uint8_t* from = all + at * group_bytes;
    if (!is_int4) {
      out[k] = static_cast<float>(from[(i / 4 * kLinearBlock + lane) * 4 + i % 4] - 128) * scale;
      continue;
    }
    const uint8_t both = from[(i / 8 * kLinearBlock + lane) * 4 + i % 4];
    out[k] = static_cast<float>((i % 8 < 4 ? both & 15 : both >> 4) - 8) * scale;
    if (weights.offsets != nullptr) {
      const int64_t pair = first * num_pairs + group / 2 * together + block - first;
      out[k] += static_cast<float>(weights.offsets[(pair * kLinearBlock + lane) * 2 + group % 2]) *
                weights.offset_scales[feature];
    }
  }
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

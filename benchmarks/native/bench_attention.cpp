// Speed of the attention kernel on one thread, at SmolLM2-135M's shape (9 heads on 3, of 64).
// usage: bench_attention [isa [format]], format one of float32, bfloat16, float16, int8
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "doubleweave/attention.h"
#include "doubleweave/rotary.h"

namespace dw = doubleweave;

namespace {

constexpr int64_t kHeads = 9;
constexpr int64_t kKvHeads = 3;
constexpr int64_t kDim = 64;

std::vector<float> random_floats(int64_t count) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

struct Times {
  double median;
  double best;
};

// Seconds a call, from samples of some milliseconds each.
template <typename Function>
Times measure(const Function& function) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [&](int count) {
    const auto start = Clock::now();
    for (int i = 0; i < count; ++i) function();
    return std::chrono::duration<double>(Clock::now() - start).count() / count;
  };
  const int count = std::max(1, static_cast<int>(5e-3 / std::max(seconds(3), 1e-9)));
  std::vector<double> samples;
  for (int i = 0; i < 41; ++i) samples.push_back(seconds(count));
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples.front()};
}

dw::CacheFormat format = dw::CacheFormat::kFloat32;

std::vector<std::byte> random_rows(int64_t num_keys) {
  std::vector<std::byte> rows(num_keys * kKvHeads * dw::head_bytes(format, kDim));
  const auto numbers = random_floats(num_keys * kKvHeads * kDim);
  dw::write_cache_heads(format, numbers.data(), num_keys * kKvHeads, kDim, rows.data());
  return rows;
}

Times time_attention(int64_t num_queries, int64_t num_keys) {
  const dw::AttentionParams params = {.num_queries = num_queries,
                                      .num_keys = num_keys,
                                      .num_heads = kHeads,
                                      .num_kv_heads = kKvHeads,
                                      .head_dim = kDim,
                                      .value_dim = kDim,
                                      .scale = 0.125f,
                                      .window = 0,
                                      .soft_cap = 0,
                                      .causal = true,
                                      .format = format};
  const auto q = random_floats(num_queries * kHeads * kDim);
  const auto k = random_rows(num_keys);
  const auto v = random_rows(num_keys);
  std::vector<float> out(q.size());
  return measure([&] { dw::attention(params, q.data(), k.data(), v.data(), out.data()); });
}

void bench_prefill(int64_t num_queries, int64_t num_keys) {
  const Times t = time_attention(num_queries, num_keys);
  const double keys_seen = num_keys - (num_queries - 1) / 2.0;  // on average
  const double flops = 4.0 * num_queries * keys_seen * kHeads * kDim;
  std::printf("prefill T=%4lld S=%5lld  %9.1f us  %6.1f GFLOP/s  (best %6.1f)\n",
              static_cast<long long>(num_queries), static_cast<long long>(num_keys), t.median * 1e6,
              flops / t.median / 1e9, flops / t.best / 1e9);
}

void bench_decode(int64_t num_keys) {
  const Times t = time_attention(1, num_keys);
  const double bytes = 2.0 * num_keys * kKvHeads * dw::head_bytes(format, kDim);
  std::printf("decode  T=   1 S=%5lld  %9.1f us  %6.1f GB/s     (best %6.1f)\n",
              static_cast<long long>(num_keys), t.median * 1e6, bytes / t.median / 1e9,
              bytes / t.best / 1e9);
}

void bench_rotary(int64_t num_tokens) {
  const auto x = random_floats(num_tokens * kHeads * kDim);
  const auto cos = random_floats(num_tokens * kDim);
  const auto sin = random_floats(num_tokens * kDim);
  std::vector<float> out(x.size());
  const Times t = measure([&] {
    dw::rotary(x.data(), cos.data(), sin.data(), out.data(), num_tokens, kHeads, kDim, kDim);
  });
  const double bytes = 2.0 * x.size() * sizeof(float);
  std::printf("rotary  T=%4lld           %8.1f us  %6.1f GB/s     (best %6.1f)\n",
              static_cast<long long>(num_tokens), t.median * 1e6, bytes / t.median / 1e9,
              bytes / t.best / 1e9);
}

bool choose_isa(const char* name) {
  for (dw::Isa isa : dw::kIsas) {
    if (std::strcmp(name, dw::isa_name(isa)) == 0) return dw::set_attention_isa(isa);
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !choose_isa(argv[1])) {
    std::fprintf(stderr, "this machine or this build has no %s\n", argv[1]);
    return 1;
  }
  for (const dw::CacheFormat known : dw::kCacheFormats) {
    if (argc > 2 && std::strcmp(argv[2], dw::format_name(known)) == 0) format = known;
  }
  std::printf("%s, a cache in %s, one thread; median of 41\n", dw::isa_name(dw::attention_isa()),
              dw::format_name(format));
  for (int64_t num_keys : {128, 512, 1024, 2048, 4096}) bench_prefill(128, num_keys);
  for (int64_t num_keys : {512, 2048, 32768}) bench_decode(num_keys);
  bench_rotary(128);
  return 0;
}

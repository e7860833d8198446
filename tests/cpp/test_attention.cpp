// Checks the attention kernel, in every instruction set that this machine has, against a plain
// float64 reference.
//
//   test_attention [PART]   tries one in PART of the random shapes, where they take long
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "doubleweave/attention.h"

namespace dw = doubleweave;

namespace {

constexpr float kGuard = 12345.5f;
constexpr int64_t kNumDistances = 21;

struct Case {
  dw::AttentionParams params;
  std::vector<float> q, k, v;                 // k and v as the cache keeps them
  std::vector<std::byte> cached_k, cached_v;  // in its format
  std::vector<float> sinks, slopes;           // empty, or one a head
  std::vector<float> distances;               // empty, or kNumDistances a head
  std::vector<double> expected;
  std::vector<double> expected_rounded;  // by queries in bfloat16, where the format has no more
  double largest_score = 0;
  double largest_output = 0;
};

std::string describe(const dw::AttentionParams& p) {
  char text[256];
  std::snprintf(text, sizeof text,
                "%s T=%lld S=%lld H=%lld/%lld D=%lld/%lld window=%lld block=%lld cap=%g %s%s%s",
                dw::format_name(p.format), static_cast<long long>(p.num_queries),
                static_cast<long long>(p.num_keys), static_cast<long long>(p.num_heads),
                static_cast<long long>(p.num_kv_heads), static_cast<long long>(p.head_dim),
                static_cast<long long>(p.value_dim), static_cast<long long>(p.window),
                static_cast<long long>(p.block), static_cast<double>(p.soft_cap),
                p.causal ? "causal" : "full", p.sinks == nullptr ? "" : " sinks",
                p.slopes != nullptr      ? " slopes"
                : p.distances != nullptr ? " distances"
                                         : "");
  return text;
}

double score(const Case& c, int64_t token, int64_t head, int64_t key) {
  const auto& p = c.params;
  const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
  const float* q = c.q.data() + (token * p.num_heads + head) * p.head_dim;
  const float* k = c.k.data() + (key * p.num_kv_heads + kv_head) * p.head_dim;
  double dot = 0;
  for (int64_t i = 0; i < p.head_dim; ++i) dot += static_cast<double>(q[i]) * k[i];
  dot *= p.scale;
  if (p.soft_cap > 0) dot = p.soft_cap * std::tanh(dot / p.soft_cap);
  const int64_t position = p.num_keys - p.num_queries + token;
  if (!c.slopes.empty()) dot += static_cast<double>(c.slopes[head]) * (key - position);
  if (!c.distances.empty()) {
    const int64_t distance = std::clamp<int64_t>(position - key, 0, kNumDistances - 1);
    dot += c.distances[head * kNumDistances + distance];
  }
  return dot;
}

void attend_one(Case& c, int64_t token, int64_t head) {
  const auto& p = c.params;
  const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
  const int64_t position = p.num_keys - p.num_queries + token;
  int64_t begin = 0;
  int64_t end = p.num_keys;
  if (p.causal) {
    end = position + 1;
    if (p.window > 0) begin = std::max<int64_t>(0, end - p.window);
    if (p.block > 0) begin = std::max(begin, position / p.block * p.block);
  }
  std::vector<double> weights;
  double largest = -INFINITY;
  for (int64_t key = begin; key < end; ++key) {
    weights.push_back(score(c, token, head, key));
    largest = std::max(largest, weights.back());
    c.largest_score = std::max(c.largest_score, std::abs(weights.back()));
  }
  double total = 0;
  if (!c.sinks.empty()) {
    largest = std::max<double>(largest, c.sinks[head]);
    total = std::exp(c.sinks[head] - largest);
    c.largest_score = std::max<double>(c.largest_score, c.sinks[head]);  // it moves every weight
  }
  for (double& weight : weights) total += weight = std::exp(weight - largest);
  for (int64_t i = 0; i < p.value_dim; ++i) {
    double sum = 0;
    for (int64_t key = begin; key < end; ++key) {
      sum += weights[key - begin] * c.v[(key * p.num_kv_heads + kv_head) * p.value_dim + i];
    }
    c.expected.push_back(sum / total);
    c.largest_output = std::max(c.largest_output, std::abs(sum / total));
  }
}

// The parameters, pointing to the case's own sinks and slopes.
dw::AttentionParams params_of(const Case& c) {
  dw::AttentionParams params = c.params;
  params.sinks = c.sinks.empty() ? nullptr : c.sinks.data();
  params.slopes = c.slopes.empty() ? nullptr : c.slopes.data();
  params.distances = c.distances.empty() ? nullptr : c.distances.data();
  params.num_distances = kNumDistances;
  return params;
}

enum Extra { kPlain = 0, kSinks = 1, kSlopes = 2, kDistances = 4 };

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// What a number of 16 bits is, by the definition of its format.
double value_of_half(uint16_t bits, bool is_bfloat16) {
  if (is_bfloat16) return float_of(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  if (exponent == 31) return fraction == 0 ? (bits >> 15 ? -INFINITY : INFINITY) : NAN;
  const double size =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -size : size;
}

// Rows of a cache, and what they stand for.
std::vector<std::byte> store(dw::CacheFormat format, int64_t dim, std::vector<float>& x) {
  const int64_t num_heads = static_cast<int64_t>(x.size()) / dim;
  std::vector<std::byte> rows(num_heads * dw::head_bytes(format, dim));
  dw::write_cache_heads(format, x.data(), num_heads, dim, rows.data());
  for (int64_t head = 0; head < num_heads; ++head) {
    const std::byte* p = rows.data() + head * dw::head_bytes(format, dim);
    for (int64_t i = 0; i < dim; ++i) {
      float& value = x[head * dim + i];
      if (format == dw::CacheFormat::kFloat32) {
        std::memcpy(&value, p + 4 * i, 4);
      } else if (format == dw::CacheFormat::kInt8) {
        float scale;
        std::memcpy(&scale, p + dim, 4);
        value = static_cast<float>(static_cast<int8_t>(p[i])) * scale;
      } else {
        uint16_t bits;
        std::memcpy(&bits, p + 2 * i, 2);
        value = static_cast<float>(value_of_half(bits, format == dw::CacheFormat::kBfloat16));
      }
    }
  }
  return rows;
}

// Queries as the pairs of the kernel have them: rounded to 8 digits when they are scaled.
std::vector<float> rounded_queries(const dw::AttentionParams& params, const std::vector<float>& q) {
  const float factor =
      params.soft_cap > 0 ? params.scale / params.soft_cap : params.scale * 1.44269504f;
  std::vector<float> rounded;
  for (const float x : q) {
    uint32_t bits;
    const float scaled = x * factor;
    std::memcpy(&bits, &scaled, sizeof bits);
    rounded.push_back(float_of((bits + 0x8000) & 0xffff0000) / factor);
  }
  return rounded;
}

void attend_all(Case& c) {
  c.expected.clear();
  c.largest_output = c.largest_score = 0;
  for (int64_t token = 0; token < c.params.num_queries; ++token) {
    for (int64_t head = 0; head < c.params.num_heads; ++head) attend_one(c, token, head);
  }
}

// Stores keys and values in the cache's format, and works out what is expected.
void complete(Case& c) {
  c.cached_k = store(c.params.format, c.params.head_dim, c.k);
  c.cached_v = store(c.params.format, c.params.value_dim, c.v);
  if (c.params.format == dw::CacheFormat::kBfloat16 || c.params.format == dw::CacheFormat::kInt8) {
    const std::vector<float> exact = c.q;
    c.q = rounded_queries(c.params, c.q);
    attend_all(c);
    c.expected_rounded = c.expected;
    c.q = exact;
  }
  attend_all(c);
}

Case make_case(const dw::AttentionParams& params, float query_size, std::mt19937& random,
               int extra = kPlain) {
  Case c{};
  c.params = params;
  std::normal_distribution<float> normal;
  for (int64_t head = 0; head < params.num_heads; ++head) {
    if (extra & kSinks) c.sinks.push_back(normal(random) * 2);
    if (extra & kSlopes) c.slopes.push_back(1.0f / static_cast<float>(int64_t{2} << head));
    for (int64_t i = 0; extra & kDistances && i < kNumDistances; ++i) {
      c.distances.push_back(normal(random) * 2);
    }
  }
  c.q.resize(params.num_queries * params.num_heads * params.head_dim);
  c.k.resize(params.num_keys * params.num_kv_heads * params.head_dim);
  c.v.resize(params.num_keys * params.num_kv_heads * params.value_dim);
  for (float& x : c.q) x = normal(random) * query_size;
  for (float& x : c.k) x = normal(random);
  for (float& x : c.v) x = normal(random);
  complete(c);
  return c;
}

// A float32 score is a sum of head_dim products: its rounding error grows with the score's size and
// (as a random walk) with the number of products, and moves every weight by as much in proportion.
// All else stays within 2e-6 of the largest output.
double tolerance(const Case& c) {
  const double score_error = 0x1p-23 * std::sqrt(c.params.head_dim) * c.largest_score;
  return c.largest_output * (2e-6 + score_error);
}

// Few rows are not computed in pairs: then the plain result is as good.
double error_against(const std::vector<double>& expected, const float* out) {
  double error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(out[i] - expected[i]);
    error = difference <= error ? error : difference;  // a NaN becomes the error
  }
  return error;
}

// The worst errors over the largest output, where scores are of ordinary size.
double worst_ordinary_error = 0;
double worst_rounded_error = 0;

void check_case(const Case& c) {
  std::vector<float> out(c.expected.size() + 2, kGuard);
  dw::attention(params_of(c), c.q.data(), c.cached_k.data(), c.cached_v.data(), out.data() + 1);
  double error = error_against(c.expected, out.data() + 1);
  double allowed = tolerance(c);
  const bool is_rounded =
      error > allowed && dw::rounds_to_bfloat16(dw::attention_isa(), c.params.format);
  if (is_rounded) {
    error = error_against(c.expected_rounded, out.data() + 1);
    // Each weight is rounded to 8 digits, of numbers that may be larger than their sum.
    float largest = 0;
    for (const float x : c.v) largest = std::max(largest, std::abs(x));
    allowed += largest * 0x1p-8;
  }
  CHECK(error <= allowed, "%s %s: error %g, allowed %g", dw::isa_name(dw::attention_isa()),
        describe(params_of(c)).c_str(), error, allowed);
  CHECK(out.front() == kGuard && out.back() == kGuard, "wrote outside: %s",
        describe(params_of(c)).c_str());
  if (c.largest_score < 10) {
    double& worst = is_rounded ? worst_rounded_error : worst_ordinary_error;
    worst = std::max(worst, error / c.largest_output);
  }
}

// Every processor for aarch64 has NEON, so its baseline is never used, and under an emulator it
// takes longer than all else.
std::vector<dw::Isa> available_isas() {
  const bool has_neon = dw::set_attention_isa(dw::Isa::kNeon);
  std::vector<dw::Isa> isas;
  for (dw::Isa isa : dw::kIsas) {
    if (!(has_neon && isa == dw::Isa::kBaseline) && dw::set_attention_isa(isa)) {
      isas.push_back(isa);
    }
  }
  return isas;
}

void check_everywhere(const Case& c) {
  for (dw::Isa isa : available_isas()) {
    // What has pairs is the same as without, but for formats that are computed in pairs.
    const bool has_pairs = isa == dw::Isa::kAvx512Bf16 || isa == dw::Isa::kNeonBf16;
    if (has_pairs && !dw::rounds_to_bfloat16(isa, c.params.format)) continue;
    dw::set_attention_isa(isa);
    check_case(c);
  }
}

template <typename T, size_t N>
T pick(const T (&values)[N], std::mt19937& random) {
  return values[random() % N];
}

dw::AttentionParams random_params(std::mt19937& random) {
  struct Heads {
    int64_t query, kv;
  };
  const Heads heads = pick<Heads>({{9, 3}, {4, 4}, {8, 1}, {6, 2}}, random);
  const int64_t head_dim = pick<int64_t>({16, 32, 40, 64, 80, 96, 128, 256, 8, 20, 33}, random);
  const int64_t value_dim =
      random() % 3 == 0 ? pick<int64_t>({8, 16, 24, 37, 64, 128}, random) : head_dim;
  const int64_t num_queries = random() % 3 == 0 ? 1 + random() % 5 : 1 + random() % 150;
  const int64_t num_keys = num_queries + (random() % 4 == 0 ? 0 : random() % 260);
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const int64_t window = pick<int64_t>({0, 0, 1, 5, 64, 1000}, random);
  const float soft_cap = pick<float>({0, 0, 0, 50.0f, 2.0f}, random);
  return {.num_queries = num_queries,
          .num_keys = num_keys,
          .num_heads = heads.query,
          .num_kv_heads = heads.kv,
          .head_dim = head_dim,
          .value_dim = value_dim,
          .scale = scale,
          .window = window,
          .soft_cap = soft_cap,
          .causal = random() % 5 != 0};
}

void test_random_shapes(int part) {
  std::mt19937 random(1);
  for (int i = 0; i < 400 / part; ++i)
    check_everywhere(make_case(random_params(random), 1.0f, random));
}

void test_sinks_slopes_and_blocks(int part) {
  std::mt19937 random(9);
  for (int i = 0; i < 300 / part; ++i) {
    dw::AttentionParams params = random_params(random);
    const int extra = 1 + i % 5;
    // Slopes are those of causal attention; a full one has positions as well, which tests both.
    params.block = params.causal ? pick<int64_t>({0, 0, 1, 7, 64, 100, 1000}, random) : 0;
    check_everywhere(make_case(params, 1.0f, random, extra));
  }
}

void test_cache_formats(int part) {
  std::mt19937 random(12);
  for (int i = 0; i < 240 / part; ++i) {
    dw::AttentionParams params = random_params(random);
    params.block = params.causal ? pick<int64_t>({0, 0, 0, 7, 100}, random) : 0;
    params.format = pick<dw::CacheFormat>(
        {dw::CacheFormat::kBfloat16, dw::CacheFormat::kFloat16, dw::CacheFormat::kInt8}, random);
    check_everywhere(make_case(params, 1.0f, random, i % 6));
  }
}

// Each number becomes the nearest one of the format, ties to even, and NaN and infinities stay.
void test_rounding_to_halves() {
  std::mt19937 random(13);
  for (dw::CacheFormat format : {dw::CacheFormat::kBfloat16, dw::CacheFormat::kFloat16}) {
    const bool is_bfloat16 = format == dw::CacheFormat::kBfloat16;
    const auto nearest = [&](float x) {
      uint16_t bits;
      dw::write_cache_heads(format, &x, 1, 1, &bits);
      return bits;
    };
    for (int i = 0; i < 20000; ++i) {
      const auto bits = static_cast<uint16_t>(random());
      const double here = value_of_half(bits, is_bfloat16);
      const double next = value_of_half(bits + 1, is_bfloat16);
      if (std::isnan(here)) {
        CHECK(std::isnan(value_of_half(nearest(NAN), is_bfloat16)), "NaN");
        continue;
      }
      CHECK(nearest(static_cast<float>(here)) == bits, "%x", bits);
      // Halfway between two finite neighbours lies a float32, unless they are subnormal.
      if (std::isinf(here) || std::isnan(next) || std::isinf(next)) continue;
      const auto middle = static_cast<float>((here + next) / 2);
      if (middle != (here + next) / 2) continue;
      CHECK(nearest(middle) == (bits % 2 == 0 ? bits : bits + 1), "middle behind %x", bits);
      CHECK(nearest(std::nextafter(middle, static_cast<float>(here))) == bits, "below %x", bits);
      CHECK(nearest(std::nextafter(middle, static_cast<float>(next))) == bits + 1, "above %x",
            bits);
    }
  }
}

void test_rounding_to_int8() {
  std::vector<float> x = {1.0f, -2.54f, 0.013f, 0, 0, 0, 0, 1e-45f, NAN, 1, INFINITY, 2};
  const std::vector<float> exact = x;
  const auto rows = store(dw::CacheFormat::kInt8, 3, x);
  CHECK(rows.size() == 4 * 7, "%zu", rows.size());
  for (int i = 0; i < 3; ++i) CHECK(std::abs(x[i] - exact[i]) <= 0.0101f, "%g", x[i]);
  for (int i = 3; i < 6; ++i) CHECK(x[i] == 0, "%g", x[i]);
  for (int i = 6; i < 12; ++i) CHECK(std::isnan(x[i]), "%g", x[i]);
}

// What an encoder gave may be fewer rows than there are queries.
void test_fewer_keys_than_queries(int part) {
  std::mt19937 random(11);
  for (int i = 0; i < 60 / part; ++i) {
    dw::AttentionParams params = random_params(random);
    params.causal = false;
    params.num_keys = pick<int64_t>({1, 2, 5, 40}, random);
    params.num_queries = params.num_keys + pick<int64_t>({1, 3, 50}, random);
    check_everywhere(make_case(params, 1.0f, random));
  }
}

// A sink far above all scores leaves keys no weight, one far below changes nothing.
void test_sinks_of_any_size() {
  std::mt19937 random(10);
  for (float sink : {-1e30f, -200.0f, 0.0f, 60.0f, 1e4f}) {
    for (int64_t num_queries : {1, 40}) {
      Case c = make_case(random_params(random), 1.0f, random);
      c.params.num_queries = num_queries;
      c.params.num_keys = num_queries + 70;
      c = make_case(c.params, 1.0f, random, kSinks);
      for (float& x : c.sinks) x = sink;
      attend_all(c);
      check_everywhere(c);
    }
  }
}

dw::AttentionParams smollm_params(int64_t num_queries, int64_t num_keys) {
  return {.num_queries = num_queries,
          .num_keys = num_keys,
          .num_heads = 9,
          .num_kv_heads = 3,
          .head_dim = 64,
          .value_dim = 64,
          .scale = 0.125f,
          .window = 0,
          .soft_cap = 0,
          .causal = true};
}

void test_each_small_shape() {
  std::mt19937 random(2);
  for (int64_t num_queries = 1; num_queries <= 20; ++num_queries) {
    for (int64_t past : {0, 1, 7, 63, 64, 130}) {
      check_everywhere(make_case(smollm_params(num_queries, num_queries + past), 1.0f, random));
    }
  }
}

void test_large_scores() {
  std::mt19937 random(3);
  for (float size : {100.0f, 4000.0f}) {
    for (int64_t num_queries : {1, 2, 50}) {
      const Case c = make_case(smollm_params(num_queries, 300), size, random);
      CHECK(size < 1000 || c.largest_score > 1e4, "only %g", c.largest_score);
      check_everywhere(c);
    }
  }
}

void test_long_context() {
  std::mt19937 random(4);
  for (int64_t num_queries : {1, 17}) {
    check_everywhere(make_case(smollm_params(num_queries, 5000), 1.0f, random));
  }
}

// Few rows go through the keys in ranges: some that a row sees nothing of, and sinks that count
// once.
void test_ranges_of_keys(int part) {
  std::mt19937 random(14);
  for (int64_t num_keys : {255, 256, 400, 1025, 3000}) {
    if (part > 1 && num_keys > 256) continue;
    for (int64_t window : {0, 3, 700}) {
      for (int64_t num_queries : {1, 2}) {
        dw::AttentionParams params = smollm_params(num_queries, num_keys);
        params.window = window;
        params.format = dw::kCacheFormats[random() % 4];
        check_everywhere(make_case(params, 1.0f, random, window == 0 ? kSinks : kPlain));
      }
    }
  }
}

// Scores that only grow, and only shrink, along the keys: a new maximum in each block, or none.
void test_running_maximum() {
  std::mt19937 random(5);
  for (float sign : {-1.0f, 1.0f}) {
    for (int64_t num_queries : {1, 40}) {
      Case c = make_case(smollm_params(num_queries, 400), 1.0f, random);
      for (float& x : c.q) x = 1.0f;
      for (size_t i = 0; i < c.k.size(); ++i) {
        c.k[i] = sign * 0.005f * static_cast<float>(i / (3 * 64));
      }
      complete(c);
      check_everywhere(c);
    }
  }
}

void test_nan_is_not_hidden() {
  std::mt19937 random(6);
  for (int64_t num_queries : {1, 30}) {
    for (dw::CacheFormat format : dw::kCacheFormats) {
      dw::AttentionParams params = smollm_params(num_queries, 100);
      params.format = format;
      Case c = make_case(params, 1.0f, random);
      c.k[40 * 3 * 64] = NAN;  // one key of the first kv head
      c.cached_k = store(format, 64, c.k);
      for (dw::Isa isa : available_isas()) {
        dw::set_attention_isa(isa);
        std::vector<float> out(c.expected.size());
        dw::attention(params_of(c), c.q.data(), c.cached_k.data(), c.cached_v.data(), out.data());
        CHECK(std::isnan(out[0]) && !std::isnan(out.back()), "%s %s", dw::isa_name(isa),
              dw::format_name(format));
      }
    }
  }
}

void on_four_threads(size_t num_items, void (*function)(void*, size_t), void* context) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t item = next++; item < num_items; item = next++) function(context, item);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

// Several threads share the items of one call; the result is the same to the last bit.
void check_shared_call(const Case& c) {
  std::vector<float> alone(c.expected.size());
  std::vector<float> shared(c.expected.size());
  dw::attention(params_of(c), c.q.data(), c.cached_k.data(), c.cached_v.data(), alone.data());
  dw::attention(params_of(c), c.q.data(), c.cached_k.data(), c.cached_v.data(), shared.data(),
                on_four_threads);
  CHECK(alone == shared, "%s", describe(params_of(c)).c_str());
}

void test_threads() {
  std::mt19937 random(7);
  std::vector<Case> cases;
  for (int i = 0; i < 24; ++i) cases.push_back(make_case(random_params(random), 1.0f, random));
  std::vector<Case> in_formats;
  for (int i = 0; i < 12; ++i) {
    dw::AttentionParams params = random_params(random);
    params.format = dw::kCacheFormats[1 + i % 3];
    in_formats.push_back(make_case(params, 1.0f, random));
  }
  for (dw::Isa isa : available_isas()) {
    dw::set_attention_isa(isa);
    for (const Case& c : cases) check_shared_call(c);
    for (const Case& c : in_formats) check_shared_call(c);
    // Different calls at once, on threads whose scratch memory grows as they go.
    std::vector<std::thread> threads;
    std::vector<std::vector<float>> outputs(cases.size());
    for (size_t first = 0; first < 4; ++first) {
      threads.emplace_back([&, first] {
        for (size_t i = first; i < cases.size(); i += 4) {
          const Case& c = cases[i];
          outputs[i].resize(c.expected.size());
          dw::attention(params_of(c), c.q.data(), c.cached_k.data(), c.cached_v.data(),
                        outputs[i].data());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t i = 0; i < cases.size(); ++i) {
      double error = 0;
      for (size_t j = 0; j < outputs[i].size(); ++j) {
        error = std::max(error, std::abs(outputs[i][j] - cases[i].expected[j]));
      }
      CHECK(error <= tolerance(cases[i]), "threads: error %g", error);
    }
  }
}

void test_choosing_an_isa() {
  CHECK(dw::set_attention_isa(dw::Isa::kBaseline), "the baseline is always there");
  CHECK(dw::attention_isa() == dw::Isa::kBaseline, "not set");
  const bool has_avx2 = dw::set_attention_isa(dw::Isa::kAvx2);
  const bool has_neon = dw::set_attention_isa(dw::Isa::kNeon);
  CHECK(!(has_avx2 && has_neon), "no machine has both");
}

}  // namespace

int main(int argc, char** argv) {
  const int part = std::max(argc > 1 ? std::atoi(argv[1]) : 1, 1);
  test_choosing_an_isa();
  test_random_shapes(part);
  test_sinks_slopes_and_blocks(part);
  test_cache_formats(part);
  test_rounding_to_halves();
  test_rounding_to_int8();
  test_fewer_keys_than_queries(part);
  test_sinks_of_any_size();
  test_each_small_shape();
  test_large_scores();
  test_long_context();
  test_ranges_of_keys(part);
  test_running_maximum();
  test_nan_is_not_hidden();
  test_threads();
  std::printf("tested:");
  for (dw::Isa isa : available_isas()) std::printf(" %s", dw::isa_name(isa));
  std::printf("; worst error at ordinary scores %.1e of the largest output, %.1e in pairs\n",
              worst_ordinary_error, worst_rounded_error);
  return check::finish();
}

// Attention for a few rows (one new token, or a handful of guesses): D is in the lanes.
//
// Such a call reads every key and value once and does little with each, so what counts is memory:
// k and v are streamed in place, each block of keys serving all the rows of the kv head. Items are
// ranges of keys (Dao et al., "Flash-Decoding", 2023): with one for each kv head, three heads would
// leave one of two threads idle for a third of the time, and each would read a third of every page
// (at 7,936 keys of 3 heads, two threads take 0.72 of that time in ranges, and one 0.83).
//
//   queries [rows, Nd, W]   scores [rows, kDecodeBlock]   output [rows, Nv, W]
// where Nd = ceil(D / W), Nv = ceil(Dv / W). A last vector that would reach past the end starts
// earlier instead: in the queries the lanes that then repeat are zero, in the output they are
// computed twice, with the same result.

constexpr int kMaxDecodeRows = kLanes / 2;  // with more, the lanes are better filled with rows
constexpr int kMaxGroup = kMaxDecodeRows < 4 ? kMaxDecodeRows : 4;  // share a load of k or v
constexpr int kDecodeTile = kTile / 2;  // of keys or columns: takes half of the registers
// Short blocks of keys hide from the hardware that k and v are streams, and even in long ones it
// fetches too late: 256 and 16 were the best of those measured on Zen 5, in the cache and out of
// it.
constexpr int kDecodeBlock = 256;
constexpr int kPrefetchKeys = 16;  // a prefetch past the end of k or v does nothing

bool decodes(const AttentionParams& params) {
  return params.num_queries * group_size(params) <= kMaxDecodeRows && params.head_dim >= kLanes &&
         params.value_dim >= kLanes;
}

// A range's keys and values, which each kv head goes through, stay in the second cache; in it, few
// are enough to begin anew.
constexpr int64_t kRangeBytes = int64_t{512} << 10;
constexpr int64_t kLeastRange = 128;

// The keys that some row sees.
KeyRange keys_seen(const AttentionParams& params) {
  return {keys_seen_by(params, 0).begin, keys_seen_by(params, params.num_queries - 1).end};
}

// A power of two, which as many threads share evenly.
int64_t num_key_ranges(const AttentionParams& params) {
  if (!decodes(params)) return 0;
  const KeyRange seen = keys_seen(params);
  const int64_t num_keys = seen.end - seen.begin;
  const int64_t bytes =
      num_keys * params.num_kv_heads *
      (head_bytes(params.format, params.head_dim) + head_bytes(params.format, params.value_dim));
  const int64_t for_threads = min(params.num_kv_heads, num_keys / kLeastRange);
  int64_t count = 1;
  while (count < for_threads || count * kRangeBytes < bytes) count *= 2;
  return count;
}

int64_t vector_offset(int64_t dim, int64_t i) { return min(i * kLanes, dim - kLanes); }

struct DecodeRow {
  float* query;   // [Nd, W]
  float* scores;  // [kDecodeBlock]
  float* output;  // [Nv, W]
  KeyRange seen{};
  int64_t position;
  float slope;  // used where there are slopes
  const float* distances;
  float running_max;
  float correction;
  Vec total;
};

int64_t decode_row_floats(const AttentionParams& params) {
  return round_up(params.head_dim, kLanes) + kDecodeBlock + round_up(params.value_dim, kLanes);
}

int64_t decode_scratch_floats(const AttentionParams& params) {
  return kMaxDecodeRows * decode_row_floats(params);
}

void start_row(const AttentionParams& params, const float* q, int64_t kv_head, int64_t index,
               bool is_first, float* scratch, DecodeRow& row) {
  const int64_t dim = params.head_dim;
  row.query = scratch + index * decode_row_floats(params);
  row.scores = row.query + round_up(dim, kLanes);
  row.output = row.scores + kDecodeBlock;
  row.seen = keys_seen_by(params, index / group_size(params));
  const Row at = row_at(params, index);
  row.position = params.num_keys - params.num_queries + at.token;
  row.slope = params.slopes == nullptr ? 0.0f : slope_of(params, kv_head, at);
  row.distances = distances_of(params, kv_head, at);
  // The sink belongs to the first range.
  row.running_max = is_first ? first_max(params, kv_head, at) : kLowest;
  row.total = Vec{};
  row.total[0] = is_first ? first_total(params) : 0.0f;
  const float* source = q + row_offset(params, kv_head, at, dim);
  const float factor = query_factor(params);
  for (int64_t i = 0; i < ceil_div(dim, kLanes); ++i) {
    const int64_t start = vector_offset(dim, i);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool repeats = start + lane < i * kLanes;
      row.query[i * kLanes + lane] = repeats ? 0.0f : source[start + lane] * factor;
    }
  }
  for (int64_t i = 0; i < round_up(params.value_dim, kLanes); ++i) row.output[i] = 0;
}

// Scores of up to kLanes keys for kRows rows; what is past num_keys repeats the last key.
template <typename Format, int kRows>
void score_lanes(const AttentionParams& params, const HeadRows& k, int64_t num_keys,
                 DecodeRow* rows, int64_t first) {
  const int64_t ahead = kPrefetchKeys * k.stride;
  const int64_t vectors = ceil_div(params.head_dim, kLanes);
  Vec products[kRows][kLanes];
  DOUBLEWEAVE_UNROLL
  for (int tile = 0; tile < kLanes; tile += kDecodeTile) {
    const std::byte* key[kDecodeTile];
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kDecodeTile; ++m) {
      key[m] = k.data + min(tile + m, num_keys - 1) * k.stride;
    }
    Vec acc[kRows][kDecodeTile] = {};
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t start = vector_offset(params.head_dim, i) * Format::kBytes;
      Vec query[kRows];
      DOUBLEWEAVE_UNROLL
      for (int r = 0; r < kRows; ++r) query[r] = load(rows[r].query + i * kLanes);
      DOUBLEWEAVE_UNROLL
      for (int m = 0; m < kDecodeTile; ++m) {
        const Vec x = Format::load(key[m] + start);
        __builtin_prefetch(key[m] + ahead + start);
        DOUBLEWEAVE_UNROLL
        for (int r = 0; r < kRows; ++r) acc[r][m] += query[r] * x;
      }
    }
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      DOUBLEWEAVE_UNROLL
      for (int m = 0; m < kDecodeTile; ++m) products[r][tile + m] = acc[r][m];
    }
  }
  Vec scales{};
  if constexpr (Format::kHasScale) {
    float found[kLanes] = {};
    gather_scales(k, min(num_keys, int64_t{kLanes}), found);
    scales = load(found);
  }
  DOUBLEWEAVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    Vec score = sum_each(products[r]);
    if constexpr (Format::kHasScale) score *= scales;
    store(rows[r].scores + first, params.soft_cap > 0 ? apply_soft_cap(params, score) : score);
  }
}

// Adds to each score what its key's distance from the query gives.
void add_slope(DecodeRow& row, KeyRange keys) {
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    row.scores[key - keys.begin] += row.slope * static_cast<float>(key - row.position);
  }
}

void add_distances(const AttentionParams& params, DecodeRow& row, KeyRange keys) {
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    row.scores[key - keys.begin] += at_distance(params, row.distances, row.position - key);
  }
}

// Turns scores into weights. Keys that the row does not see, and the padding, weigh nothing.
void exponentiate_row(DecodeRow& row, KeyRange keys) {
  const int64_t padded = round_up(keys.end - keys.begin, kLanes);
  for (int64_t i = 0; i < row.seen.begin - keys.begin && i < padded; ++i) {
    row.scores[i] = -__builtin_inff();
  }
  const int64_t seen_end = row.seen.end - keys.begin;
  for (int64_t i = seen_end < 0 ? 0 : seen_end; i < padded; ++i) row.scores[i] = -__builtin_inff();

  Vec largest = splat(row.running_max);
  for (int64_t i = 0; i < padded; i += kLanes) largest = max(load(row.scores + i), largest);
  const Vec maximum = splat(max_lane(largest));
  row.correction = exp2(splat(row.running_max) - maximum)[0];
  row.running_max = maximum[0];
  Vec sum{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec weight = exp2(load(row.scores + i) - maximum);
    sum += weight;
    store(row.scores + i, weight);
  }
  row.total = row.total * splat(row.correction) + sum;
}

// Multiplies weights by the scales of their values.
template <int kRows>
void scale_weights(const HeadRows& v, int64_t num_keys, DecodeRow* rows) {
  float scales[kDecodeBlock] = {};
  gather_scales(v, num_keys, scales);
  for (int64_t i = 0; i < num_keys; i += kLanes) {
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      store(rows[r].scores + i, load(rows[r].scores + i) * load(scales + i));
    }
  }
}

// Adds weights * v to output vectors [first, first + kCount).
template <typename Format, int kRows, int kCount>
void value_vectors(const HeadRows& v, int64_t num_keys, DecodeRow* rows, int64_t first) {
  const int64_t ahead = kPrefetchKeys * v.stride;
  const std::byte* column[kCount];
  DOUBLEWEAVE_UNROLL
  for (int m = 0; m < kCount; ++m) {
    column[m] = v.data + vector_offset(v.dim, first + m) * Format::kBytes;
  }
  Vec acc[kRows][kCount] = {};
  for (int64_t key = 0; key < num_keys; ++key) {
    Vec value[kCount];
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const std::byte* p = column[m] + key * v.stride;
      value[m] = Format::load(p);
      __builtin_prefetch(p + ahead);
    }
    DOUBLEWEAVE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(rows[r].scores[key]);
      DOUBLEWEAVE_UNROLL
      for (int m = 0; m < kCount; ++m) acc[r][m] += weight * value[m];
    }
  }
  DOUBLEWEAVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    DOUBLEWEAVE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      float* p = rows[r].output + (first + m) * kLanes;
      store(p, load(p) * splat(rows[r].correction) + acc[r][m]);
    }
  }
}

template <typename Format, int kRows>
void decode_keys(const AttentionParams& params, const HeadRows& k, const HeadRows& v, KeyRange keys,
                 DecodeRow* rows) {
  const int64_t num_keys = keys.end - keys.begin;
  for (int64_t i = 0; i < num_keys; i += kLanes) {
    score_lanes<Format, kRows>(params, rows_from(k, keys.begin + i), num_keys - i, rows, i);
  }
  // Per block of keys, so that a block's scores stay in L1 between the two products.
  DOUBLEWEAVE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (params.slopes != nullptr) add_slope(rows[r], keys);
    if (params.distances != nullptr) add_distances(params, rows[r], keys);
    exponentiate_row(rows[r], keys);
  }
  const HeadRows values = rows_from(v, keys.begin);
  if constexpr (Format::kHasScale) scale_weights<kRows>(values, num_keys, rows);
  const int64_t vectors = ceil_div(v.dim, kLanes);
  int64_t first = 0;
  for (; first + kDecodeTile <= vectors; first += kDecodeTile) {
    value_vectors<Format, kRows, kDecodeTile>(values, num_keys, rows, first);
  }
  for (; first < vectors; ++first) value_vectors<Format, kRows, 1>(values, num_keys, rows, first);
}

// From a number of rows at run time to loops of a constant number, whose accumulators are
// registers.
template <typename Format, int kRows>
void decode_group(const AttentionParams& params, const HeadRows& k, const HeadRows& v,
                  KeyRange keys, int64_t num_rows, DecodeRow* rows) {
  if (num_rows == kRows) {
    decode_keys<Format, kRows>(params, k, v, keys, rows);
  } else if constexpr (kRows > 1) {
    decode_group<Format, kRows - 1>(params, k, v, keys, num_rows, rows);
  }
}

// [Dv + 2]: the output, which is still to be divided by the total, the largest score, the total.
void finish_row(const AttentionParams& params, const DecodeRow& row, float* out) {
  for (int64_t i = 0; i < ceil_div(params.value_dim, kLanes); ++i) {
    store(out + vector_offset(params.value_dim, i), load(row.output + i * kLanes));
  }
  out[params.value_dim] = row.running_max;
  out[params.value_dim + 1] = sum_lanes(row.total);
}

template <typename Format>
void decode_head(const AttentionParams& params, const AttentionInputs& inputs, int64_t kv_head,
                 KeyRange range, bool is_first) {
  const int64_t num_rows = params.num_queries * group_size(params);
  DecodeRow rows[kMaxDecodeRows];
  for (int64_t r = 0; r < num_rows; ++r) {
    start_row(params, inputs.q, kv_head, r, is_first, inputs.scratch, rows[r]);
  }
  const HeadRows k = rows_of_head(params, inputs.k, kv_head, params.head_dim);
  const HeadRows v = rows_of_head(params, inputs.v, kv_head, params.value_dim);
  for (int64_t key = range.begin; key < range.end; key += kDecodeBlock) {
    const KeyRange keys = {key, min(range.end, key + kDecodeBlock)};
    for (int64_t r = 0; r < num_rows; r += kMaxGroup) {
      decode_group<Format, kMaxGroup>(params, k, v, keys, min(kMaxGroup, num_rows - r), rows + r);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    finish_row(params, rows[r],
               inputs.out + row_offset(params, kv_head, row_at(params, r), params.value_dim + 2));
  }
}

template <typename Format>
void decode_as(const AttentionParams& params, const AttentionInputs& inputs, KeyRange range,
               bool is_first) {
  for (int64_t kv_head = 0; kv_head < params.num_kv_heads; ++kv_head) {
    decode_head<Format>(params, inputs, kv_head, range, is_first);
  }
}

void decode(const AttentionParams& params, const AttentionInputs& inputs, int64_t range,
            int64_t num_ranges) {
  const KeyRange seen = keys_seen(params);
  const int64_t each = round_up(ceil_div(seen.end - seen.begin, num_ranges), kLanes);
  const int64_t begin = min(seen.end, seen.begin + range * each);
  const KeyRange keys = {begin, min(seen.end, begin + each)};
  const bool is_first = range == 0;
  switch (params.format) {
    case CacheFormat::kFloat32:
      return decode_as<Float32>(params, inputs, keys, is_first);
    case CacheFormat::kBfloat16:
      return decode_as<Bfloat16>(params, inputs, keys, is_first);
    case CacheFormat::kFloat16:
      return decode_as<Float16>(params, inputs, keys, is_first);
    case CacheFormat::kInt8:
      return decode_as<Int8>(params, inputs, keys, is_first);
  }
}

// How rows are rounded: a part of linears_kernel.inc.h, in its namespace and behind its vectors.

// The lanes moved by so many places, round the end.
template <int kBy, typename V, size_t... kLane>
DOUBLEWEAVE_INLINE V rotated_lanes(V x, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(x, x, (kLane + kBy) % kLanes...);
}

// All lanes by halves: one after the other they would wait for each other.
template <int kBy = kLanes / 2>
DOUBLEWEAVE_INLINE int32_t total_of(IntVec x) {
  x += rotated_lanes<kBy>(x, std::make_index_sequence<kLanes>());
  if constexpr (kBy > 1) {
    return total_of<kBy / 2>(x);
  } else {
    return x[0];
  }
}

template <int kBy = kLanes / 2>
DOUBLEWEAVE_INLINE float largest_of(Vec x) {
  x = max(x, rotated_lanes<kBy>(x, std::make_index_sequence<kLanes>()));
  if constexpr (kBy > 1) {
    return largest_of<kBy / 2>(x);
  } else {
    return x[0];
  }
}

// Writes numbers of a row in the form that `dot` reads.
DOUBLEWEAVE_INLINE void put_numbers(uint8_t* to, IntVec numbers) {
#if defined(DOUBLEWEAVE_DOT_MADD)
  constexpr int kPlace[4] = {0, 2, 1, 3};
  for (int i = 0; i < kLanes; ++i) {
    const auto wide = static_cast<uint16_t>(numbers[i]);
    uint8_t* place = to + i / 4 * kQuadBytes + 2 * kPlace[i % 4];
    place[0] = static_cast<uint8_t>(wide);
    place[1] = static_cast<uint8_t>(wide >> 8);
  }
#else
  *reinterpret_cast<MemoryByteVec*>(to) = __builtin_convertvector(numbers, ByteVec);
#endif
}

// Numbers of a row from `k` on, of which there are `left`; none behind them.
DOUBLEWEAVE_INLINE Vec load_left(const float* x, int64_t k, int64_t left) {
  return left >= kLanes ? load(x + k) : left > 0 ? load_up_to(x + k, left) : Vec{};
}

// x times the sigmoid of z.
DOUBLEWEAVE_INLINE Vec times_sigmoid(Vec x, Vec z) {
  const Vec exponent = z * splat(-0x1.715476p0f);  // of 2
  return x / (splat(1.0f) + exp2(exponent < splat(126.0f) ? exponent : splat(126.0f)));
}

template <RowKind kKind>
DOUBLEWEAVE_INLINE Vec computed(const RowSource& source, float factor, int64_t k, int64_t left) {
  const Vec x = load_left(source.x, k, left);
  if constexpr (kKind == RowKind::kPlain) return x;
  const Vec other = load_left(source.other, k, left);
  if constexpr (kKind == RowKind::kNormed) return x * splat(factor) * other;
  if constexpr (kKind == RowKind::kSilu) return times_sigmoid(x, x) * other;
  // 0.5 * (1 + tanh(y)) is sigmoid(2 * y).
  const Vec cubic = splat(0x1.988454p0f) * x * (splat(1.0f) + splat(0.044715f) * x * x);
  return times_sigmoid(x, cubic) * other;
}

float norm_factor(const RowSource& source, int64_t in_features) {
  Vec sum{};
  for (int64_t k = 0; k < in_features; k += kLanes) {
    const Vec x = load_left(source.x, k, in_features - k);
    sum += x * x;
  }
  const float mean = sum_lanes(sum) / static_cast<float>(in_features);
  return 1.0f / __builtin_sqrtf(mean + source.epsilon);
}

// Groups that are rounded together: what waits for one of them does not hold up the others.
constexpr int kGroupsTogether = 8;
constexpr int kGroupVectors = kInt8Group / kLanes;

// Rounds `count` groups from group `first` on; returns the largest sum of a half, as what it stands
// for.
template <RowKind kKind>
float pack_groups(const RowSource& source, float factor, int64_t in_features, int64_t first,
                  int count, const PackedRow& row, uint8_t* packed, Vec& poison) {
  const float kRound = 0x1.8p23f;
  Vec values[kGroupsTogether][kGroupVectors];
  Vec high[kGroupsTogether];
  float steps[kGroupsTogether];
  float inverses[kGroupsTogether];
  IntVec sums[kGroupsTogether][2];
  for (int i = 0; i < count; ++i) {
    high[i] = Vec{};
    DOUBLEWEAVE_UNROLL
    for (int v = 0; v < kGroupVectors; ++v) {
      const int64_t k = (first + i) * kInt8Group + v * kLanes;
      const Vec value = computed<kKind>(source, factor, k, in_features - k);
      values[i][v] = value;
      high[i] = max(high[i], max(value, -value));
      poison += value - value;
    }
  }
  for (int i = 0; i < count; ++i) {
    const float largest = largest_of(high[i]);
    steps[i] = largest * (1.0f / 127.0f);
    inverses[i] = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
  }
  for (int i = 0; i < count; ++i) {
    sums[i][0] = sums[i][1] = IntVec{};
    DOUBLEWEAVE_UNROLL
    for (int v = 0; v < kGroupVectors; ++v) {
      Vec value = (values[i][v] * splat(inverses[i]) + splat(kRound)) - splat(kRound);
      // The smaller of the two first: a NaN becomes a number, and what it is does not count.
      value = max(splat(-127.0f), value < splat(127.0f) ? value : splat(127.0f));
      const IntVec numbers = __builtin_convertvector(value, IntVec);
      sums[i][2 * v / kGroupVectors] += numbers;
      put_numbers(packed + ((first + i) * kInt8Group + v * kLanes) / 4 * kQuadBytes, numbers);
    }
  }
  auto* scales = reinterpret_cast<float*>(packed + row.scales) + first;
  auto* sums_int8 = reinterpret_cast<int32_t*>(packed + row.sums_int8) + first;
  auto* sums_int4 = reinterpret_cast<int32_t*>(packed + row.sums_int4) + 2 * first;
  float largest_sum = 0;
  for (int i = 0; i < count; ++i) {
    scales[i] = steps[i];
    int32_t total = 0;
    DOUBLEWEAVE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t of_half = total_of(sums[i][half]);
      total += of_half;
      sums_int4[2 * i + half] = -kAddedToInt4 * of_half;
      const float stands_for = static_cast<float>(of_half < 0 ? -of_half : of_half) * steps[i];
      largest_sum = stands_for > largest_sum ? stands_for : largest_sum;
    }
    sums_int8[i] = -kAddedToInt8 * total;
  }
  return largest_sum;
}

template <RowKind kKind>
void pack_row_of(const RowSource& source, int64_t in_features, uint8_t* packed) {
  const float factor = kKind == RowKind::kNormed ? norm_factor(source, in_features) : 0.0f;
  const int64_t num_groups = linear_group_pairs(in_features);
  const PackedRow row = packed_row(num_groups);
  auto* scales = reinterpret_cast<float*>(packed + row.scales);
  const auto* sums_int4 = reinterpret_cast<const int32_t*>(packed + row.sums_int4);
  float largest_sum = 0;
  Vec poison{};  // NaN where a number is not finite
  for (int64_t g = 0; g < num_groups; g += kGroupsTogether) {
    const int64_t left = num_groups - g;
    const int count = left < kGroupsTogether ? static_cast<int>(left) : kGroupsTogether;
    const float sum =
        pack_groups<kKind>(source, factor, in_features, g, count, row, packed, poison);
    largest_sum = sum > largest_sum ? sum : largest_sum;
  }
  const float poisoned = sum_lanes(poison);
  if (!(poisoned == 0.0f)) {
    for (int64_t g = 0; g < num_groups; ++g) scales[g] += poisoned;
  }
  // Products with as many offsets of 8 bits stay in 32.
  int64_t most = (int64_t{1} << 24) / (2 * num_groups);
  most = most < 32767 ? most : 32767;
  const float sum_step = largest_sum > 0x1p-100f ? largest_sum / static_cast<float>(most) : 1.0f;
  const float inverse = 1.0f / sum_step;
  auto* half_sums = reinterpret_cast<int16_t*>(packed + row.half_sums);
  for (int64_t half = 0; half < 2 * num_groups; ++half) {
    const auto total = static_cast<float>(sums_int4[half] / -kAddedToInt4);
    float steps = total * scales[half / 2] * inverse;
    steps += steps < 0 ? -0.5f : 0.5f;
    // What is not finite is none in the scales already.
    const bool is_in_range = -32768.0f < steps && steps < 32768.0f;
    half_sums[half] = is_in_range ? static_cast<int16_t>(steps) : 0;
  }
  *reinterpret_cast<float*>(packed + row.sum_step) = sum_step;
}

void pack_row(const RowSource& source, int64_t in_features, uint8_t* packed) {
  switch (source.kind) {
    case RowKind::kPlain:
      return pack_row_of<RowKind::kPlain>(source, in_features, packed);
    case RowKind::kSilu:
      return pack_row_of<RowKind::kSilu>(source, in_features, packed);
    case RowKind::kGelu:
      return pack_row_of<RowKind::kGelu>(source, in_features, packed);
    case RowKind::kNormed:
      return pack_row_of<RowKind::kNormed>(source, in_features, packed);
  }
}

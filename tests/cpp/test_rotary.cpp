// Checks the rotary embedding against its definition.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "doubleweave/rotary.h"

namespace dw = doubleweave;

namespace {

void check_rotary(int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t rotary_dim,
                  std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(num_tokens * num_heads * head_dim);
  std::vector<float> cos(num_tokens * rotary_dim);
  std::vector<float> sin(num_tokens * rotary_dim);
  for (auto* values : {&x, &cos, &sin}) {
    for (float& value : *values) value = normal(random);
  }
  std::vector<float> out(x.size());
  dw::rotary(x.data(), cos.data(), sin.data(), out.data(), num_tokens, num_heads, head_dim,
             rotary_dim);
  double error = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t column = i % head_dim;
    const int64_t token = i / (num_heads * head_dim);
    const int64_t half = rotary_dim / 2;
    double expected = x[i];
    if (column < rotary_dim) {
      const double partner = column < half ? -x[i + half] : x[i - half];
      const int64_t angle = token * rotary_dim + column;
      expected = expected * cos[angle] + partner * sin[angle];
    }
    error = std::max(error, std::abs(out[i] - expected) / (1 + std::abs(expected)));
  }
  CHECK(error < 1e-6, "rotary %lld/%lld: error %g", static_cast<long long>(rotary_dim),
        static_cast<long long>(head_dim), error);
  dw::rotary(x.data(), cos.data(), sin.data(), x.data(), num_tokens, num_heads, head_dim,
             rotary_dim);
  CHECK(x == out, "rotary in place");
}

void test_rotary() {
  std::mt19937 random(8);
  check_rotary(1, 9, 64, 64, random);
  check_rotary(37, 3, 64, 64, random);
  check_rotary(5, 4, 80, 32, random);
  check_rotary(4, 2, 40, 20, random);
  check_rotary(3, 2, 16, 2, random);
}

}  // namespace

int main() {
  test_rotary();
  return check::finish();
}

// Rotary position embedding, in float32.
#pragma once

#include <cstdint>

namespace doubleweave {

// Rotates the first rotary_dim (R, even) of each head's head_dim values, and copies the rest:
//   out[..., :R] = x[..., :R] * cos + cat(-x[..., R/2:R], x[..., :R/2]) * sin
// the half-rotation convention of Hugging Face's apply_rotary_pos_emb. x and out are
// [num_tokens, num_heads * head_dim], cos and sin [num_tokens, rotary_dim], all contiguous.
// It runs in place when out == x; out must otherwise not overlap x, and never cos or sin.
void rotary(const float* x, const float* cos, const float* sin, float* out, int64_t num_tokens,
            int64_t num_heads, int64_t head_dim, int64_t rotary_dim);

}  // namespace doubleweave

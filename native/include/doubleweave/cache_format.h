// The formats of the rows of keys and values that a cache keeps, and their writing. Knows nothing
// of attention.
#pragma once

#include <cstddef>
#include <cstdint>

namespace doubleweave {

// kBfloat16 and kFloat16 round each number to the nearest, ties to even. kInt8 keeps, for each head
// of a row, numbers in [-127, 127] and behind them a float32 scale, which is the largest magnitude
// of the head over 127: the symmetric scheme of llama.cpp's Q8_0, over a head in place of 32
// numbers.
enum class CacheFormat { kFloat32, kBfloat16, kFloat16, kInt8 };

constexpr CacheFormat kCacheFormats[] = {CacheFormat::kFloat32, CacheFormat::kBfloat16,
                                         CacheFormat::kFloat16, CacheFormat::kInt8};

const char* format_name(CacheFormat format);  // "float32", "bfloat16", "float16", "int8"

// The bytes of one head of a row. (No inline function: see attention_kernel.h.)
int64_t head_bytes(CacheFormat format, int64_t dim);

// Writes rows x [num_heads, dim], one behind the other, in a format. NaN and infinities stay what
// they are, but in kInt8 a head with one of them reads as NaN; kFloat16 has infinities beyond
// 65,504.
void write_cache_heads(CacheFormat format, const float* x, int64_t num_heads, int64_t dim,
                       void* out);

}  // namespace doubleweave

// The attention kernel for x86-64 with AVX-512 and its products of bfloat16; compile with
// -mavx512f -mavx512vl -mavx512dq -mavx512bw -mavx512bf16 -mfma -mf16c -mprefer-vector-width=512.
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512BW__) && defined(__AVX512BF16__)
#define DOUBLEWEAVE_ISA_NAMESPACE avx512bf16
#define DOUBLEWEAVE_ISA Isa::kAvx512Bf16
#define DOUBLEWEAVE_VECTOR_BYTES 64
#define DOUBLEWEAVE_VECTOR_REGISTERS 32
#define DOUBLEWEAVE_BF16_PAIRS
#include "attention_kernel.inc.h"
#elif defined(__x86_64__)
#error "attention_avx512bf16.cpp needs the flags named above"
#endif

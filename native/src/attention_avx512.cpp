// The attention kernel for x86-64 with AVX-512; compile with
// -mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mf16c -mprefer-vector-width=512.
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define DOUBLEWEAVE_ISA_NAMESPACE avx512
#define DOUBLEWEAVE_ISA Isa::kAvx512
#define DOUBLEWEAVE_VECTOR_BYTES 64
#define DOUBLEWEAVE_VECTOR_REGISTERS 32
#include "attention_kernel.inc.h"
#elif defined(__x86_64__)
#error "attention_avx512.cpp needs the AVX-512 flags named above"
#endif

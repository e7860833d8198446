// The attention kernel for x86-64 with AVX2 and FMA; compile with -mavx2 -mfma -mf16c.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DOUBLEWEAVE_ISA_NAMESPACE avx2
#define DOUBLEWEAVE_ISA Isa::kAvx2
#define DOUBLEWEAVE_VECTOR_BYTES 32
#define DOUBLEWEAVE_VECTOR_REGISTERS 16
#include "attention_kernel.inc.h"
#elif defined(__x86_64__)
#error "attention_avx2.cpp needs -mavx2 -mfma -mf16c"
#endif

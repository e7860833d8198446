// The kernel of linears for x86-64 with AVX2; compile with -mavx2 -mfma.
#if defined(__AVX2__) && defined(__FMA__)
#define DOUBLEWEAVE_ISA_NAMESPACE linears_avx2
#define DOUBLEWEAVE_ISA_NAME "avx2"
#define DOUBLEWEAVE_VECTOR_BYTES 32
#define DOUBLEWEAVE_VECTOR_REGISTERS 16
#define DOUBLEWEAVE_DOT_MADD
#include "linears_kernel.inc.h"
#elif defined(__x86_64__)
#error "linears_avx2.cpp needs the flags named above"
#endif

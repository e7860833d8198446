// The kernel of linears for x86-64 with AVX-512 and VNNI; compile with
// -mavx512f -mavx512vl -mavx512dq -mavx512bw -mavx512vnni -mfma -mprefer-vector-width=512.
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define DOUBLEWEAVE_ISA_NAMESPACE linears_avx512vnni
#define DOUBLEWEAVE_ISA_NAME "avx512vnni"
#define DOUBLEWEAVE_VECTOR_BYTES 64
#define DOUBLEWEAVE_VECTOR_REGISTERS 32
#define DOUBLEWEAVE_DOT_VNNI
#include "linears_kernel.inc.h"
#elif defined(__x86_64__)
#error "linears_avx512vnni.cpp needs the flags named above"
#endif

// The kernel of linears for x86-64 with AVX-VNNI; compile with -mavx2 -mfma -mavxvnni.
#if defined(__AVXVNNI__) && defined(__FMA__)
#define DOUBLEWEAVE_ISA_NAMESPACE linears_avxvnni
#define DOUBLEWEAVE_ISA_NAME "avxvnni"
#define DOUBLEWEAVE_VECTOR_BYTES 32
#define DOUBLEWEAVE_VECTOR_REGISTERS 16
#define DOUBLEWEAVE_DOT_VNNI
#include "linears_kernel.inc.h"
#elif defined(__x86_64__)
#error "linears_avxvnni.cpp needs the flags named above"
#endif

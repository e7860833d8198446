// The kernel of linears for aarch64 with products of bytes; compile with -march=armv8.2-a+dotprod.
#if defined(__aarch64__)
#define DOUBLEWEAVE_ISA_NAMESPACE linears_neondot
#define DOUBLEWEAVE_ISA_NAME "neondot"
#define DOUBLEWEAVE_VECTOR_BYTES 16
#define DOUBLEWEAVE_VECTOR_REGISTERS 32
#define DOUBLEWEAVE_DOT_NEON
#include "linears_kernel.inc.h"
#endif

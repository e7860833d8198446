// The kernel of linears for aarch64, in the instructions that every such processor has.
#if defined(__aarch64__)
#define DOUBLEWEAVE_ISA_NAMESPACE linears_neon
#define DOUBLEWEAVE_ISA_NAME "neon"
#define DOUBLEWEAVE_VECTOR_BYTES 16
#define DOUBLEWEAVE_VECTOR_REGISTERS 32
#include "linears_kernel.inc.h"
#endif

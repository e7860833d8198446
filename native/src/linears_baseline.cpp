// The kernel of linears for any machine: 16-byte vectors, which every compiler can lower.
#define DOUBLEWEAVE_ISA_NAMESPACE linears_baseline
#define DOUBLEWEAVE_ISA_NAME "baseline"
#define DOUBLEWEAVE_VECTOR_BYTES 16
#define DOUBLEWEAVE_VECTOR_REGISTERS 16
#if defined(__SSE2__)
#define DOUBLEWEAVE_DOT_MADD
#endif
#include "linears_kernel.inc.h"

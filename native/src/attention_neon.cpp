// The attention kernel for AArch64, whose 32 vector registers hold twice the baseline's tile.
#if defined(__aarch64__)
#define DOUBLEWEAVE_ISA_NAMESPACE neon
#define DOUBLEWEAVE_ISA Isa::kNeon
#define DOUBLEWEAVE_VECTOR_BYTES 16
#define DOUBLEWEAVE_VECTOR_REGISTERS 32
#include "attention_kernel.inc.h"
#endif

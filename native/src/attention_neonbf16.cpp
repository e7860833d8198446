// The attention kernel for AArch64 with products of bfloat16; compile with -march=armv8.2-a+bf16.
#if defined(__aarch64__)
#define DOUBLEWEAVE_ISA_NAMESPACE neonbf16
#define DOUBLEWEAVE_ISA Isa::kNeonBf16
#define DOUBLEWEAVE_VECTOR_BYTES 16
#define DOUBLEWEAVE_VECTOR_REGISTERS 32
#define DOUBLEWEAVE_BF16_PAIRS
#include "attention_kernel.inc.h"
#endif

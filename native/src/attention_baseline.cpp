// The attention kernel for any machine: 16-byte vectors, which every compiler can lower.
#define DOUBLEWEAVE_ISA_NAMESPACE baseline
#define DOUBLEWEAVE_ISA Isa::kBaseline
#define DOUBLEWEAVE_VECTOR_BYTES 16
#define DOUBLEWEAVE_VECTOR_REGISTERS 16
#include "attention_kernel.inc.h"

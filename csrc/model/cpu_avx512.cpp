#ifdef __x86_64__
#define LEEWAY_ISA avx512
#include "../common/isa.h"
#include "cpu_kernels.h"
#endif

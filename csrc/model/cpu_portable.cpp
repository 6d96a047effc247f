#define LEEWAY_ISA portable
#include "../common/isa.h"
#include "cpu_kernels.h"

#define LEEWAY_ISA avx2
#include "blocks.h"  // before the instruction set: other files use these functions too
#include "../common/isa.h"
#include "cpu_blocks.h"

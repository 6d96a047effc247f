#define LEEWAY_ISA avx2
#include "../common/isa.h"
#include "cpu_rows.h"

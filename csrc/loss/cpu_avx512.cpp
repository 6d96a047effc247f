#define LEEWAY_ISA avx512
#include "../common/isa.h"
#include "cpu_rows.h"

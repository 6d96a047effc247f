#define LEEWAY_ISA portable
#include "../common/isa.h"
#include "cpu_rows.h"

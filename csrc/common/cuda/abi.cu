// The C interface that this library was compiled against; the loader compares.
#include "../../api/types.h"

extern "C" int leeway_abi(void) { return LEEWAY_ABI; }

// engine.ops._ops: the torch operators `leeway::*`. Each family registers its own in a file beside this one.
#include <torch/library.h>

#include "../api/types.h"

TORCH_LIBRARY(leeway, m) { m.def("abi() -> int", []() -> int64_t { return LEEWAY_ABI; }); }

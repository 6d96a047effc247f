// What all kernels' C interfaces share.
//
// The kernels stand behind plain C functions, which the torch bindings, the CUDA library and the sanitizers' driver have
// in common. Arrays are contiguous unless a stride is given, in elements. CPU functions work on the range [begin, end)
// of their rows, sequences or blocks, so the caller owns the threads; none allocates more than thread-local scratch.
// CUDA functions enqueue on `stream` (a cudaStream_t) and return a cudaError_t, 0 for success; none synchronises or
// allocates.
#pragma once

#include <stdint.h>

enum { LEEWAY_ABI = 1 };  // raised with every change in this folder

typedef enum { LEEWAY_F64, LEEWAY_F32, LEEWAY_BF16, LEEWAY_F16 } LeewayType;

// Chooses the instruction set of the rest of a file, which defines LEEWAY_ISA as portable, avx2 or avx512 before it.
//
// What comes after belongs into namespace leeway::LEEWAY_ISA, so that the linker never takes one set's function for
// another's. For the same reason such files use no templates or inline functions from headers that this one does not
// include: those would be compiled with instructions that the processor may lack.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "bf16.h"

#define LEEWAY_LANES_portable 4
#define LEEWAY_LANES_avx2 8
#define LEEWAY_LANES_avx512 16
#define LEEWAY_JOIN_(a, b) a##b
#define LEEWAY_JOIN(a, b) LEEWAY_JOIN_(a, b)
#define LEEWAY_LANES LEEWAY_JOIN(LEEWAY_LANES_, LEEWAY_ISA)  // floats in a vector

// Floats in a vector of x86 instructions, for what only those can do. (The compiler's own macros, such as __AVX2__, do
// not follow the pragma.)
#ifdef __x86_64__
#define LEEWAY_X86 LEEWAY_LANES
#else
#define LEEWAY_X86 0
#endif

#if LEEWAY_X86 == 16
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#elif LEEWAY_X86 == 8
#pragma GCC target("avx2,fma,f16c")
#endif

// Functions that the host and CUDA devices compile from one source.
#pragma once

#ifdef __CUDACC__
#define LEEWAY_HD __host__ __device__ inline
#else
#define LEEWAY_HD inline
#endif

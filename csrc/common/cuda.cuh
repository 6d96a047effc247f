// What a .cu file needs beside its mathematics. It compiles with nvcc, and with g++ against tests/emulator.
//
//     __global__ void __launch_bounds__(256) scale_rows(const float* in, float* out, int64_t columns) {
//       float* row = shared<float>();                                     // as many bytes as the launch asked for
//       for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) ...
//       __syncthreads();                                                  // by all threads of the block, or none
//       float total = warp_reduce(part, [](float a, float b) { return a + b; });
//     }
//
//     extern "C" int leeway_scale_rows_cuda(const LeewayRows* rows, void* stream) {
//       if (rows->num_rows == 0) return cudaSuccess;                      // an empty grid is an error
//       return leeway::launch<scale_rows>({.grid = num_rows, .block = 256, .shared = bytes}, stream, in, out, columns);
//     }
//
// The emulator runs what this subset allows: one-dimensional grids, only dynamic shared memory (through `shared`), warp
// functions with the full mask and whole warps, __syncthreads and its votes, clusters and asynchronous copies through
// the functions below, atomics of integers only. Rows times columns pass 2^31: int64_t.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace leeway {

// --- Launching.

struct Shape {
  int64_t grid;          // blocks, a multiple of `cluster`
  unsigned block;        // threads, a multiple of 32
  unsigned cluster = 1;  // blocks that see each other's shared memory; above 1 from sm_90 on, at most 8
  size_t shared = 0;     // bytes of each block
};

#ifdef __CUDACC__
template <auto kernel, typename... Arguments>
cudaError_t launch(const Shape& shape, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1;
  if (shape.shared > 48 << 10) {  // more than every block may have unasked
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, limit, static_cast<int>(shape.shared));
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#else
template <auto kernel, typename... Arguments>
cudaError_t launch(const Shape& shape, void*, const Arguments&... arguments) {
  const unsigned grid = static_cast<unsigned>(shape.grid);
  return emulator::launch({__PRETTY_FUNCTION__, grid, shape.block, shape.cluster, shape.shared}, kernel, arguments...);
}
#endif

inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}

// --- Within a block.

// The block's shared memory, 128-byte aligned.
template <typename T>
__device__ __forceinline__ T* shared(size_t byte_offset = 0) {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char leeway_shared[];
  return reinterpret_cast<T*>(leeway_shared + byte_offset);
#else
  return reinterpret_cast<T*>(emulator::place().shared + byte_offset);
#endif
}

constexpr unsigned kFullMask = 0xffffffffu;

// Every lane gets the same bits: each step combines pairs, and `combine` must be commutative.
template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kFullMask, value, step));
  return value;
}

// --- Memory. A row that passes through once goes by the evict-first hint, so that it pushes nothing out of L2.

__device__ __forceinline__ uint4 load16_once(const void* from) { return __ldcs(static_cast<const uint4*>(from)); }
__device__ __forceinline__ void store16_once(void* to, uint4 value) { __stcs(static_cast<uint4*>(to), value); }
__device__ __forceinline__ void store8_once(void* to, uint2 value) { __stcs(static_cast<uint2*>(to), value); }

// 16 bytes from global to shared memory, both aligned. A thread sees its own copies once it has waited for their group,
// others' only after a barrier beyond that.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  emulator::copy_async(to, from, 16);
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_async_commit();
#endif
}

// Until at most `groups_left` of the groups committed last are in flight.
template <int groups_left>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#else
  emulator::copy_async_wait(groups_left);
#endif
}

// --- Clusters. Below sm_90 a cluster is one block.

__device__ __forceinline__ unsigned cluster_rank() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif defined(__CUDACC__)
  return 0;
#else
  return emulator::place().cluster_rank;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#elif defined(__CUDACC__)
  return 1;
#else
  return emulator::place().cluster_size;
#endif
}

// The cluster's barrier in two halves: what a thread wrote before arriving, to global or shared memory, is seen by
// those that have waited. A block may look into another's shared memory only after a barrier since both started, and
// none may end before a barrier after the last look.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  __syncwarp();  // the barrier is a warp's, not a thread's
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emulator::cluster_arrive();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif defined(__CUDACC__)
  __syncthreads();
#else
  emulator::cluster_wait();
#endif
}

// The place in block `rank`'s shared memory that `mine` is in this block's.
template <typename T>
__device__ __forceinline__ const T* cluster_map(const T* mine, unsigned rank) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  const T* theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
#elif defined(__CUDACC__)
  return mine;
#else
  return static_cast<const T*>(emulator::cluster_map(mine, rank));
#endif
}

}  // namespace leeway

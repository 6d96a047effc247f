// A stand-in for CUDA's header, so that g++ compiles the .cu files and a CPU runs them:
//
//     g++ -std=c++20 -I tests/emulator -x c++ csrc/*/cuda/*.cu tests/emulator/emulator.cpp
//
// Each thread of a block, and of a cluster's blocks, is a fiber that runs until it waits for others; clusters run one
// after the other. It aborts, naming the kernel, when threads wait for one that never comes. Shared memory is allocated
// to the byte and starts as NaN, for AddressSanitizer; under ThreadSanitizer two threads that touch the same shared or
// global memory without a barrier between them are a race, as on a GPU.
//
// Environment: LEEWAY_EMULATED_SM (80 or 90) and LEEWAY_EMULATED_SHARED (bytes a block may have) describe the device.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// --- What a kernel sees.

namespace emulator {

struct Index {
  unsigned x;
};
struct Place {
  Index thread, block, block_size, grid_size;
  unsigned cluster_rank, cluster_size;
  unsigned char* shared;
};
Place place();  // of the thread that runs

void sync_block();
int vote_block(int predicate);                     // how many threads of the block say yes
unsigned vote_warp(unsigned mask, int predicate);  // which lanes of the warp do
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane);  // for that lane's value
void cluster_arrive();
void cluster_wait();
void* cluster_map(const void* mine, unsigned rank);
void copy_async(void* to, const void* from, size_t bytes);  // takes place when it is waited for
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

template <typename T>
T from_lane(unsigned mask, T value, unsigned lane, bool inside) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, lane % 32);
  if (inside) std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return place().thread.x % 32; }

}  // namespace emulator

#define threadIdx (emulator::place().thread)
#define blockIdx (emulator::place().block)
#define blockDim (emulator::place().block_size)
#define gridDim (emulator::place().grid_size)

inline void __syncthreads() { emulator::sync_block(); }
inline int __syncthreads_count(int predicate) { return emulator::vote_block(predicate); }
inline int __syncthreads_or(int predicate) { return emulator::vote_block(predicate) > 0; }
inline int __syncthreads_and(int predicate) { return emulator::vote_block(!predicate) == 0; }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::from_lane(mask, value, emulator::lane() / width * width + lane % width, true);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = emulator::lane() ^ bits;
  return emulator::from_lane(mask, value, lane, lane / width <= emulator::lane() / width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emulator::from_lane(mask, value, emulator::lane() - by, emulator::lane() % width >= by);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emulator::from_lane(mask, value, emulator::lane() + by, emulator::lane() % width + by < unsigned(width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::vote_warp(mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { __ballot_sync(mask, 0); }

template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(unsigned value) { return std::countl_zero(value); }
inline int __ffs(unsigned value) { return value == 0 ? 0 : std::countr_zero(value) + 1; }

// Of integers only: atomic sums of floats depend on the order of execution.
template <std::integral T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <std::integral T>
T atomicOr(T* to, std::type_identity_t<T> value) {
  return __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
}
template <std::integral T>
T atomicXor(T* to, std::type_identity_t<T> value) {
  return __atomic_fetch_xor(to, value, __ATOMIC_RELAXED);
}

// --- What the host sees.

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
typedef struct CUstream_st* cudaStream_t;

cudaError_t cudaMalloc(void** to, size_t bytes);  // filled with NaN
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulator {

struct Launch {
  const char* kernel;
  unsigned grid, block, cluster;
  size_t shared;
};
cudaError_t run(const Launch&, void (*body)(void*), void* argument);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Launch& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
  std::tuple<void (*)(Parameters...), std::tuple<Parameters...>> call{kernel, {arguments...}};
  auto body = [](void* argument) {
    const auto& [function, values] = *static_cast<const decltype(call)*>(argument);
    std::apply(function, values);
  };
  return run(shape, body, &call);
}

}  // namespace emulator

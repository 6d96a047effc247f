// Kernels that are right, and kernels with one fault each: `checks NAME` runs one, exits 0 where its result is right.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/common/cuda.cuh"

using namespace leeway;

namespace {

__device__ float add(float a, float b) { return a + b; }

// The cluster's blocks each sum a part of 4096 numbers, brought in by asynchronous copies, and then all parts.
__global__ void sum(const float* in, float* out, int fault) {
  float* part = shared<float>();
  float* warps = shared<float>(blockDim.x * 4 * sizeof(float));
  const int64_t begin = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  copy_async(part + threadIdx.x * 4, in + begin);
  copy_async_commit();
  if (fault != 1) copy_async_wait<0>();
  float total = 0;
  for (int i = 0; i < 4; ++i) total += part[threadIdx.x * 4 + i];
  total = warp_reduce(total, add);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  if (fault == 2 && threadIdx.x == 5) return;
  if (fault != 3) __syncthreads();
  total = 0;
  for (unsigned i = 0; i < blockDim.x / 32 + (fault == 4); ++i) total += warps[i];
  __syncthreads();
  if (threadIdx.x == 0) warps[0] = total;
  if (fault != 5) cluster_arrive();
  if (fault != 5) cluster_wait();
  total = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) total += *cluster_map(warps, rank);
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void lanes(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned odd = __ballot_sync(kFullMask, lane % 2);
  const int before = __shfl_up_sync(kFullMask, lane, 1), after = __shfl_down_sync(kFullMask, lane, 2, 8);
  const int all = __syncthreads_count(lane < 3), first = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x), 0);
  out[threadIdx.x] = static_cast<int>(odd & 15) * 1000000 + before * 10000 + after * 100 + all * 10 + first / 32;
}

int check_sum(int fault) {
  constexpr int kBlocks = 16, kCluster = 4, kThreads = 64;
  std::vector<float> in(kBlocks * kThreads * 4), out(kBlocks, -1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 7);
  const size_t bytes = (kThreads * 4 + kThreads / 32) * sizeof(float);
  const Shape shape{.grid = kBlocks, .block = kThreads, .cluster = kCluster, .shared = bytes};
  if (launch<sum>(shape, nullptr, in.data(), out.data(), fault) != cudaSuccess) return 2;
  for (int block = 0; block < kBlocks; ++block) {
    float expected = 0;
    const size_t size = kCluster * kThreads * 4;
    for (size_t i = 0; i < size; ++i) expected += in[block / kCluster * size + i];
    if (out[block] != expected) return 3;
  }
  return 0;
}

int check_lanes() {
  std::vector<int> out(64);
  if (launch<lanes>(Shape{.grid = 1, .block = 64}, nullptr, out.data()) != cudaSuccess) return 2;
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, before = lane > 0 ? lane - 1 : 0, after = lane % 8 < 6 ? lane + 2 : lane;
    if (out[i] != 10 * 1000000 + before * 10000 + after * 100 + 6 * 10 + i / 32) return 3;
  }
  return 0;
}

// What the device does not have is refused, not run.
int check_limits() {
  std::vector<int> out(1024);
  const auto refuses = [&](Shape shape) { return launch<lanes>(shape, nullptr, out.data()) != cudaSuccess; };
  return !(refuses({.grid = 0, .block = 32}) && refuses({.grid = 1, .block = 2048}) &&
           refuses({.grid = 3, .block = 32, .cluster = 2}) && refuses({.grid = 16, .block = 32, .cluster = 16}) &&
           refuses({.grid = 1, .block = 32, .shared = 228 << 10}));
}

}  // namespace

int main(int, char** argv) {
  const char* const faults[] = {"sum", "unwaited", "missing", "race", "overrun", "cluster-race"};
  for (int fault = 0; fault < 6; ++fault) {
    if (std::strcmp(argv[1], faults[fault]) == 0) return check_sum(fault);
  }
  return std::strcmp(argv[1], "lanes") == 0 ? check_lanes() : check_limits();
}

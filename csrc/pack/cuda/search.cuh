// Which run or sequence a position belongs to, for a warp whose positions lie close together.
#pragma once

#include "../../common/cuda.cuh"
#include "../runs.h"

namespace leeway {

constexpr unsigned kSearchThreads = 256;
constexpr int kPerLane = 8;
constexpr int64_t kWarpPositions = 32 * kPerLane;

inline Shape search_shape(int64_t num_positions) {
  const int64_t per_block = kSearchThreads / 32 * kWarpPositions;
  return {.grid = (num_positions + per_block - 1) / per_block, .block = kSearchThreads};
}

// The first position of this warp; its lanes take it and the 255 that follow, 32 at a time.
__device__ __forceinline__ int64_t warp_begin() {
  return (int64_t(blockIdx.x) * kSearchThreads + threadIdx.x) / 32 * kWarpPositions;
}

// `last_before` of runs [0, num): 32 at a time are compared.
template <typename Runs>
__device__ __forceinline__ int64_t warp_last_before(const Runs& runs, int64_t position, int64_t num) {
  int64_t first = 0, last = num - 1;
  while (first < last) {
    const int64_t step = (last - first + 31) / 32, probe = first + step * (threadIdx.x % 32 + 1);
    const unsigned before = __ballot_sync(kFullMask, probe <= last && runs.to(probe) <= position);
    first += step * __popc(before);
    if (last > first + step - 1) last = first + step - 1;
  }
  return first;
}

// The same for a position that lies a little behind those of run `i`.
template <typename Runs>
__device__ __forceinline__ int64_t advance(const Runs& runs, int64_t i, int64_t position, int64_t num) {
  while (i + 1 < num && runs.to(i + 1) <= position) ++i;
  return i;
}

}  // namespace leeway

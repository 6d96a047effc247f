// How many changes there are before a stretch, found while those before it may still be counted.
//
// Stretches are taken in order. Each tells first how many changes it has and, once it knows, how many there are up to
// its end; one that looks back adds up the former until it meets one of the latter. Only the one word is exchanged.
#pragma once

#include "../../common/cuda.cuh"

namespace leeway {

enum State : uint64_t { kNothing, kOwn, kUpToEnd };  // in a word's lowest 2 bits; the number above

using Word = volatile unsigned long long;

__device__ __forceinline__ void tell(Word* states, int64_t stretch, int64_t number, State state) {
  states[stretch] = static_cast<unsigned long long>(number) << 2 | state;
}

// By one whole warp.
__device__ inline int64_t look_back(Word* states, int64_t stretch) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int64_t before = 0;
  for (int64_t nearest = stretch - 1;; nearest -= 32) {
    const int64_t mine = nearest - lane;
    unsigned long long word;
    do {
      word = mine < 0 ? static_cast<unsigned long long>(kUpToEnd) : states[mine];
    } while (__any_sync(kFullMask, word % 4 == kNothing));
    const unsigned ends = __ballot_sync(kFullMask, word % 4 == kUpToEnd);
    const bool counts = ends == 0 || lane < __ffs(static_cast<int>(ends));
    before += warp_reduce(counts ? static_cast<int64_t>(word >> 2) : 0, [](int64_t a, int64_t b) { return a + b; });
    if (ends != 0) return before;
  }
}

}  // namespace leeway

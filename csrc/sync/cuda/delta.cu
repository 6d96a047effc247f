// What changed in a bucket since the version before, and the way back.
#include "granules.cuh"
#include "look_back.cuh"

namespace leeway {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kUnits = kGranule / 2;  // of a granule
static_assert(kRounds == 4, "a thread's counts of changes are four fields of 16 bits");

// --- Units of a granule.

__device__ __forceinline__ unsigned unit_of(const Granule& granule, int unit) {
  return unsigned((unit < kUnits / 2 ? granule.low : granule.high) >> unit % 4 * 16) & 0xffff;
}

__device__ __forceinline__ unsigned differing(const Granule& a, const Granule& b) {
  unsigned mask = 0;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) mask |= unsigned(unit_of(a, unit) != unit_of(b, unit)) << unit;
  return mask;
}

struct Changed {
  uint32_t* counts;
  uint16_t *offsets, *values;
  int64_t capacity;
};

struct Ordered {  // shared memory
  int64_t stretch, before;
  uint64_t warps[kWarps];  // each one's changes by round, in fields of 16 bits
};

__device__ __forceinline__ int64_t total_of(uint64_t fields) {
  return (fields & 0xffff) + (fields >> 16 & 0xffff) + (fields >> 32 & 0xffff) + (fields >> 48);
}

// For each round, the changes of the threads before this one, and of the whole block.
__device__ __forceinline__ void count_before(Ordered* ordered, uint64_t mine, uint64_t& before, uint64_t& all) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t up_to = mine;
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kFullMask, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == 31) ordered->warps[warp] = up_to;
  __syncthreads();
  before = up_to - mine;
  all = 0;
#pragma unroll
  for (unsigned i = 0; i < kWarps; ++i) {
    if (i < warp) before += ordered->warps[i];
    all += ordered->warps[i];
  }
}

__global__ void __launch_bounds__(kThreads, 3) delta(LeewayBucket bucket, int64_t stretches, Changed changed,
                                                     uint64_t* sum, unsigned long long* scratch) {
  Ordered* ordered = shared<Ordered>();
  Word* states = scratch + 1;
  int64_t index = -1;
  uint64_t part = 0;
  for (;;) {
    if (threadIdx.x == 0) ordered->stretch = static_cast<int64_t>(atomicAdd(scratch, 1ull));
    __syncthreads();
    const int64_t stretch = ordered->stretch;
    if (stretch >= stretches) break;

    Granule made[kRounds];
    make_stretch(bucket, index, stretch, made);
    unsigned masks[kRounds];
    uint64_t mine = 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t at = granule_at(stretch, round), count = bucket.num_bytes - at;
      masks[round] = differing(made[round], load_granule(bucket, at));
      mine |= uint64_t(__popc(masks[round])) << 16 * round;
      if (count > 0) part += mix_granule(made[round], count, bucket.position + at);
      if (masks[round] != 0) store_granule(bucket, at, made[round]);
    }

    uint64_t before, all;
    count_before(ordered, mine, before, all);
    if (threadIdx.x < 32) {
      const int64_t own = total_of(all);
      if (threadIdx.x == 0) tell(states, stretch, own, stretch == 0 ? kUpToEnd : kOwn);
      const int64_t earlier = look_back(states, stretch);
      if (threadIdx.x == 0) {
        tell(states, stretch, earlier + own, kUpToEnd);
        ordered->before = earlier;
        atomicAdd(&changed.counts[stretch * LEEWAY_STRETCH_BYTES / LEEWAY_BLOCK_BYTES], static_cast<uint32_t>(own));
      }
    }
    __syncthreads();

    int64_t of_round = ordered->before;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      int64_t to = of_round + (before >> 16 * round & 0xffff);
      of_round += all >> 16 * round & 0xffff;
      const int64_t first = granule_at(stretch, round) % LEEWAY_BLOCK_BYTES / 2;
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        if ((masks[round] >> unit & 1) == 0) continue;
        if (to < changed.capacity) {
          changed.offsets[to] = static_cast<uint16_t>(first + unit);
          changed.values[to] = static_cast<uint16_t>(unit_of(made[round], unit));
        }
        ++to;
      }
    }
  }
  add_to(sum, part);
}

// --- The way back.

__device__ __forceinline__ int64_t blocks_of(const LeewayBucket& bucket) {
  return ceil_div(bucket.num_bytes, LEEWAY_BLOCK_BYTES);
}

__global__ void __launch_bounds__(kThreads) find_misfits(LeewayBucket bucket, LeewayChanges changes,
                                                         uint32_t* misfits) {
  const int64_t blocks = blocks_of(bucket);
  bool fits = changes.starts[blocks] == changes.num_changes;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first = changes.starts[block], last = changes.starts[block + 1];
    const int64_t units = least(LEEWAY_BLOCK_UNITS, bucket.num_bytes / 2 - block * LEEWAY_BLOCK_UNITS);
    if (first < 0 || last < first || last > changes.num_changes) {
      fits = false;
      continue;
    }
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
      fits = fits && changes.offsets[i] < units && (i == first || changes.offsets[i] > changes.offsets[i - 1]);
    }
  }
  const unsigned bad = __ballot_sync(kFullMask, !fits);
  if (threadIdx.x % 32 == 0 && bad != 0) atomicAdd(misfits, static_cast<uint32_t>(__popc(bad)));
}

// The first change of each word makes all of them: the word's mix is taken out of the sum and put in anew.
__global__ void __launch_bounds__(kThreads) apply(LeewayBucket bucket, LeewayChanges changes, const uint32_t* misfits,
                                                  uint64_t* sum) {
  if (*misfits != 0) return;
  uint64_t part = 0;
  for (int64_t block = blockIdx.x; block < blocks_of(bucket); block += gridDim.x) {
    const int64_t first = changes.starts[block], last = changes.starts[block + 1];
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
      const int word = changes.offsets[i] / 4;
      if (i > first && changes.offsets[i - 1] / 4 == word) continue;
      const int64_t at = block * LEEWAY_BLOCK_BYTES + word * 8, size = least(8, bucket.num_bytes - at);
      const uint64_t key = key_of((bucket.position + at) / 8), before = load_part(bucket.bytes + at, size).low;
      uint64_t after = before;
      for (int64_t j = i; j < last && changes.offsets[j] / 4 == word; ++j) {
        const int shift = changes.offsets[j] % 4 * 16;
        after = (after & ~(uint64_t(0xffff) << shift)) | uint64_t(changes.values[j]) << shift;
      }
      store_part(bucket.bytes + at, {after, 0}, size);
      part += mix(after, key) - mix(before, key);
    }
  }
  add_to(sum, part);
}

}  // namespace
}  // namespace leeway

using namespace leeway;

extern "C" int leeway_delta_cuda(const LeewayBucket* bucket, uint32_t* counts, uint16_t* offsets, uint16_t* values,
                                 int64_t capacity, uint64_t* sum, void* scratch, void* stream) {
  const int64_t stretches = num_stretches(*bucket);
  if (stretches == 0) return cudaSuccess;
  const Shape shape{.grid = num_resident(stretches, 4), .block = kThreads, .shared = sizeof(Ordered)};
  const Changed changed{counts, offsets, values, capacity};
  return launch<delta>(shape, stream, *bucket, stretches, changed, sum, static_cast<unsigned long long*>(scratch));
}

extern "C" int leeway_apply_cuda(const LeewayBucket* bucket, const LeewayChanges* changes, uint64_t* sum,
                                 uint32_t* misfits, void* stream) {
  const int64_t blocks = ceil_div(bucket->num_bytes, LEEWAY_BLOCK_BYTES);
  if (blocks == 0) return cudaSuccess;
  const Shape shape{.grid = num_resident(blocks, 8), .block = kThreads};
  const cudaError_t error = launch<find_misfits>(shape, stream, *bucket, *changes, misfits);
  return error != cudaSuccess ? error : launch<apply>(shape, stream, *bucket, *changes, misfits, sum);
}

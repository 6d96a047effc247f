// Per-token columns from sequences, and reductions over sequences: short ones by a warp, long ones by a block.
#include "../reduce.h"
#include "search.cuh"

namespace leeway {
namespace {

constexpr int64_t kIgnored = -100;
constexpr int64_t kShort = 2048;  // tokens that a warp sums by itself
constexpr int64_t kBlocks = 1024;  // about as many as run at a time
constexpr int kWarps = 8;

struct Bounds {
  const LeewayPacked& packed;

  __device__ int64_t to(int64_t i) const { return packed.cu_seqlens[i]; }
};

// `visit(t, i)` for this warp's tokens t, each of sequence i.
template <typename Visit>
__device__ __forceinline__ void for_tokens(const LeewayPacked& packed, Visit visit) {
  const Bounds bounds{packed};
  const int64_t begin = warp_begin(), num = packed.num_sequences;
  if (begin >= packed.num_tokens || num == 0) return;
  int64_t i = warp_last_before(bounds, begin, num);
  for (int64_t t = begin + threadIdx.x % 32; t < begin + kWarpPositions && t < packed.num_tokens; t += 32) {
    i = advance(bounds, i, t, num);
    visit(t, i);
  }
}

__global__ void __launch_bounds__(kSearchThreads) layout(const LeewayTokenLayout args) {
  for_tokens(args.packed, [&](int64_t t, int64_t i) {
    const int64_t begin = args.packed.cu_seqlens[i], end = args.packed.cu_seqlens[i + 1];
    const bool predicts = t + 1 < end && t + 1 < args.packed.num_tokens && t + 1 - begin >= args.prompt_lengths[i];
    args.position_ids[t] = t - begin;
    args.labels[t] = predicts ? args.tokens[t + 1] : kIgnored;
    args.mask[t] = predicts ? 1.0f : 0.0f;
    args.sequence[t] = i;
  });
}

template <typename T>
__global__ void __launch_bounds__(kSearchThreads) spread(const LeewaySpread args) {
  for_tokens(args.packed, [&](int64_t t, int64_t i) {
    const T value = static_cast<const T*>(args.values)[i];
    static_cast<T*>(args.result)[t] = args.mask ? value * static_cast<const T*>(args.mask)[t] : value;
  });
}

template <bool greatest>
__device__ Part<greatest> warp_join(Part<greatest> part) {
  for (int step = 16; step > 0; step /= 2) {
    part = part.join({__shfl_xor_sync(kFullMask, part.value, step), __shfl_xor_sync(kFullMask, part.count, step)});
  }
  return part;
}

// What `num_threads` threads, of which this is number `thread`, find in tokens [begin, end).
template <typename T, bool greatest>
__device__ Part<greatest> part_of(const LeewayReduce& args, int64_t begin, int64_t end, unsigned thread,
                                  unsigned num_threads) {
  const T* values = static_cast<const T*>(args.values);
  const T* mask = static_cast<const T*>(args.mask);
  auto part = Part<greatest>::none();
#pragma unroll 4
  for (int64_t t = begin + thread; t < end; t += num_threads) part = part.with(values[t], mask ? mask[t] : T(1));
  return warp_join(part);
}

template <typename T, bool greatest>
__device__ void write(const LeewayReduce& args, int64_t i, const Part<greatest>& part) {
  static_cast<T*>(args.result)[i] = static_cast<T>(part.result(args.reduction));
  static_cast<T*>(args.count)[i] = static_cast<T>(part.count);
}

// A block has the sequences i with i % gridDim.x == blockIdx.x, a warp every eighth of these; where there are few, each
// has a block of its own. Which threads sum a sequence, and so the result's last bits, depends on its length alone.
template <typename T, bool greatest>
__global__ void __launch_bounds__(kWarps * 32) reduce(const LeewayReduce args) {
  auto* parts = shared<Part<greatest>>();
  const int64_t num = args.packed.num_sequences, num_tokens = args.packed.num_tokens;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto bound = [&](int64_t i) {
    const int64_t t = args.packed.cu_seqlens[i];
    return t < 0 ? 0 : t < num_tokens ? t : num_tokens;
  };
  for (int64_t first = blockIdx.x; first < num; first += int64_t(gridDim.x) * kWarps) {
    const int64_t mine = first + int64_t(gridDim.x) * warp;
    if (mine < num && bound(mine + 1) - bound(mine) <= kShort) {
      const auto part = part_of<T, greatest>(args, bound(mine), bound(mine + 1), lane, 32);
      if (lane == 0) write<T, greatest>(args, mine, part);
    }
    for (int w = 0; w < kWarps; ++w) {
      const int64_t i = first + int64_t(gridDim.x) * w;
      if (i >= num || bound(i + 1) - bound(i) <= kShort) continue;
      const auto part = part_of<T, greatest>(args, bound(i), bound(i + 1), threadIdx.x, kWarps * 32);
      if (lane == 0) parts[warp] = part;
      __syncthreads();
      auto total = parts[0];
      for (int k = 1; k < kWarps; ++k) total = total.join(parts[k]);
      if (threadIdx.x == 0) write<T, greatest>(args, i, total);
      __syncthreads();
    }
  }
}

template <typename T, bool greatest>
int launch_reduce(const LeewayReduce& args, void* stream) {
  const int64_t num = args.packed.num_sequences;
  const Shape shape{.grid = num < kBlocks ? num : kBlocks, .block = kWarps * 32, .shared = kWarps * sizeof(Part<greatest>)};
  return launch<reduce<T, greatest>>(shape, stream, args);
}

template <typename T>
int launch_reduce(const LeewayReduce& args, void* stream) {
  return args.reduction == LEEWAY_MAX ? launch_reduce<T, true>(args, stream) : launch_reduce<T, false>(args, stream);
}

}  // namespace
}  // namespace leeway

extern "C" int leeway_token_layout_cuda(const LeewayTokenLayout* args, void* stream) {
  using namespace leeway;
  if (args->packed.num_tokens == 0) return cudaSuccess;
  return launch<layout>(search_shape(args->packed.num_tokens), stream, *args);
}

extern "C" int leeway_reduce_cuda(const LeewayReduce* args, void* stream) {
  using namespace leeway;
  if (args->packed.num_sequences == 0) return cudaSuccess;
  return args->type == LEEWAY_F64 ? launch_reduce<double>(*args, stream) : launch_reduce<float>(*args, stream);
}

extern "C" int leeway_spread_cuda(const LeewaySpread* args, void* stream) {
  using namespace leeway;
  if (args->packed.num_tokens == 0) return cudaSuccess;
  const Shape shape = search_shape(args->packed.num_tokens);
  return args->type == LEEWAY_F64 ? launch<spread<double>>(shape, stream, *args)
                                  : launch<spread<float>>(shape, stream, *args);
}

// Generalised advantages as a scan: a block takes a sequence in tiles from right to left, a thread four tokens.
//
// Each token maps the A' that reaches it to A = shift + scale A', and so do several in a row: maps of threads combine
// within warps, those of warps by the first one. The value V' that a token needs is the value of the next token that the
// policy chose, which ballots find. With its own A' and V' each thread then goes over its tokens as the CPU does.
#include "../../common/cuda.cuh"
#include "../../api/pack.h"
#include "../gae.h"

namespace leeway {
namespace {

constexpr int kTokens = 4;  // of a thread
constexpr unsigned kMostWarps = 32;

template <typename T>
constexpr unsigned kMostThreads = kMostWarps * 32 * sizeof(float) / sizeof(T);  // with registers for all

struct Affine {
  double scale, shift;

  __device__ static Affine identity() { return {1, 0}; }
  __device__ double operator()(double later) const { return shift + scale * later; }
  // This one after `later`.
  __device__ Affine after(const Affine& later) const { return {scale * later.scale, shift + scale * later.shift}; }
};

struct Maps {
  Affine critic, policy;

  __device__ static Maps identity() { return {Affine::identity(), Affine::identity()}; }
  __device__ Maps after(const Maps& later) const { return {critic.after(later.critic), policy.after(later.policy)}; }
};

struct Advantages {
  double critic, policy;
};

// Shared by the warps of a block.
struct Shared {
  Maps maps[kMostWarps];             // of each warp's tokens
  Advantages reaching[kMostWarps];   // what reaches each warp from behind
  double value[kMostWarps];          // of each warp's first chosen token
  bool chosen[kMostWarps];           // whether there is one
  Advantages leaving;                // what leaves the tile
};

template <typename T>
struct alignas(16) Four {
  T at[kTokens];
};

// Four tokens; of those outside the sequence none is chosen.
template <typename T>
struct Tokens {
  Four<T> rewards, values;
  unsigned chosen;  // a bit for each
};

template <typename T>
__device__ __forceinline__ Tokens<T> load(const LeewayGae& args, int64_t first, int64_t begin, int64_t end, bool aligned) {
  const T* rewards = static_cast<const T*>(args.rewards);
  const T* values = static_cast<const T*>(args.values);
  const T* mask = static_cast<const T*>(args.mask);
  Tokens<T> tokens{{}, {}, 0};
  if (aligned && begin <= first && first + kTokens <= end) {
    tokens.rewards = *reinterpret_cast<const Four<T>*>(rewards + first);
    tokens.values = *reinterpret_cast<const Four<T>*>(values + first);
    tokens.chosen = (1 << kTokens) - 1;
    if (mask) {
      const Four<T> masks = *reinterpret_cast<const Four<T>*>(mask + first);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (masks.at[k] == 0) tokens.chosen &= ~(1u << k);
      }
    }
    return tokens;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const int64_t t = first + k;
    if (t < begin || t >= end) continue;
    tokens.rewards.at[k] = rewards[t];
    tokens.values.at[k] = values[t];
    if (!mask || mask[t] != 0) tokens.chosen |= 1u << k;
  }
  return tokens;
}

template <typename T>
__device__ __forceinline__ void store(void* to, const Four<T>& four, int64_t first, int64_t begin, int64_t end, bool aligned) {
  T* out = static_cast<T*>(to);
  if (aligned && begin <= first && first + kTokens <= end) {
    *reinterpret_cast<Four<T>*>(out + first) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    if (begin <= first + k && first + k < end) out[first + k] = four.at[k];
  }
}

// Of each lane, its own map after those of all later lanes.
__device__ __forceinline__ Maps suffix_scan(Maps maps, unsigned lane) {
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const Maps later{{__shfl_down_sync(kFullMask, maps.critic.scale, step), __shfl_down_sync(kFullMask, maps.critic.shift, step)},
                     {__shfl_down_sync(kFullMask, maps.policy.scale, step), __shfl_down_sync(kFullMask, maps.policy.shift, step)}};
    if (lane + step < 32) maps = maps.after(later);
  }
  return maps;
}

// What reaches each lane from those behind it, given what reaches the last one.
__device__ __forceinline__ Advantages reaching(const Maps& scanned, const Advantages& last, unsigned lane) {
  const Advantages out{scanned.critic(last.critic), scanned.policy(last.policy)};
  const Advantages in{__shfl_down_sync(kFullMask, out.critic, 1), __shfl_down_sync(kFullMask, out.policy, 1)};
  return lane == 31 ? last : in;
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads<T>) gae(const LeewayGae args, bool aligned) {
  Shared& block = *shared<Shared>();
  const int64_t i = blockIdx.x, num_tokens = args.packed.num_tokens;
  const int64_t begin = args.packed.cu_seqlens[i] < 0 ? 0 : args.packed.cu_seqlens[i];
  const int64_t end = args.packed.cu_seqlens[i + 1] < num_tokens ? args.packed.cu_seqlens[i + 1] : num_tokens;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const double critic = static_cast<const T*>(args.lambda_critic)[i], policy = static_cast<const T*>(args.lambda_policy)[i];
  const Decay decay{args.gamma, args.gamma * critic, args.gamma * policy};

  Carry behind{args.bootstrap ? double(static_cast<const T*>(args.bootstrap)[i]) : 0, 0, 0};  // the tile
  const int64_t tile = int64_t(blockDim.x) * kTokens;
  const int64_t last = (end + kTokens - 1) / kTokens * kTokens;
  int64_t first = last - tile + threadIdx.x * kTokens;
  Tokens<T> next = load<T>(args, first, begin, end, aligned);
  for (int64_t left = (last - begin + tile - 1) / tile; left > 0; --left, first -= tile) {
    const Tokens<T> tokens = next;
    if (left > 1) next = load<T>(args, first - tile, begin, end, aligned);

    double own = 0;  // value of this thread's first chosen token
#pragma unroll
    for (int k = kTokens - 1; k >= 0; --k) own = tokens.chosen >> k & 1 ? tokens.values.at[k] : own;
    const unsigned choosing = __ballot_sync(kFullMask, tokens.chosen != 0);
    const unsigned later = lane == 31 ? 0 : choosing >> (lane + 1);
    const double neighbour = __shfl_sync(kFullMask, own, later ? lane + __ffs(later) : lane);
    const double warps_first = __shfl_sync(kFullMask, own, choosing ? __ffs(choosing) - 1 : 0);
    if (lane == 0) block.value[warp] = warps_first, block.chosen[warp] = choosing != 0;
    __syncthreads();
    const unsigned warps_choosing = __ballot_sync(kFullMask, lane < num_warps && block.chosen[lane]);
    const unsigned warps_later = warp == 31 ? 0 : warps_choosing >> (warp + 1);
    const double value = later ? neighbour : warps_later ? block.value[warp + __ffs(warps_later)] : behind.value;
    if (warps_choosing) behind.value = block.value[__ffs(warps_choosing) - 1];

    Maps maps = Maps::identity();
    double following = value;
#pragma unroll
    for (int k = kTokens - 1; k >= 0; --k) {
      if (!(tokens.chosen >> k & 1)) continue;
      const double delta = Carry::surprise(tokens.rewards.at[k], following, tokens.values.at[k], decay);
      maps = Maps{{decay.critic, delta}, {decay.policy, delta}}.after(maps);
      following = tokens.values.at[k];
    }
    maps = suffix_scan(maps, lane);
    if (lane == 0) block.maps[warp] = maps;
    __syncthreads();
    if (warp == 0) {
      const Maps warps = suffix_scan(lane < num_warps ? block.maps[lane] : Maps::identity(), lane);
      const Advantages last{behind.critic, behind.policy};
      const Advantages reached = reaching(warps, last, lane);
      if (lane < num_warps) block.reaching[lane] = reached;
      if (lane == 0) block.leaving = {warps.critic(last.critic), warps.policy(last.policy)};
    }
    __syncthreads();
    const Advantages reached = reaching(maps, block.reaching[warp], lane);
    behind.critic = block.leaving.critic, behind.policy = block.leaving.policy;

    Carry carry{value, reached.critic, reached.policy};
    Four<T> advantages, returns;
#pragma unroll
    for (int k = kTokens - 1; k >= 0; --k) {
      if (tokens.chosen >> k & 1) carry = carry.before(tokens.rewards.at[k], tokens.values.at[k], decay);
      advantages.at[k] = static_cast<T>(carry.policy);
      returns.at[k] = static_cast<T>(carry.critic + tokens.values.at[k]);
    }
    store(args.advantages, advantages, first, begin, end, aligned);
    store(args.returns, returns, first, begin, end, aligned);
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// As many threads as a sequence of mean length keeps busy.
unsigned num_threads(const LeewayPacked& packed, unsigned most) {
  unsigned threads = 128;
  while (threads < most && int64_t(threads) * kTokens * packed.num_sequences < packed.num_tokens) threads *= 2;
  return threads;
}

template <typename T>
int launch_gae(const LeewayGae& args, void* stream) {
  const bool aligned = is_aligned(args.rewards) && is_aligned(args.values) && is_aligned(args.mask) &&
                       is_aligned(args.advantages) && is_aligned(args.returns);
  const unsigned threads = num_threads(args.packed, kMostThreads<T>);
  const Shape shape{.grid = args.packed.num_sequences, .block = threads, .shared = sizeof(Shared)};
  return launch<gae<T>>(shape, stream, args, aligned);
}

}  // namespace
}  // namespace leeway

extern "C" int leeway_gae_cuda(const LeewayGae* args, void* stream) {
  using namespace leeway;
  if (args->packed.num_sequences == 0) return cudaSuccess;
  return args->type == LEEWAY_F64 ? launch_gae<double>(*args, stream) : launch_gae<float>(*args, stream);
}

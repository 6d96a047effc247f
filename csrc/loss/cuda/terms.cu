// What tokens make of their log-probabilities, on a GPU: a block for each sequence goes over its tokens once, and twice
// before where they depend on each other. Sums are in double and merged in a fixed order.
#include "../../common/cuda.cuh"
#include "../token_loss.h"

namespace leeway {
namespace {

constexpr unsigned kFewThreads = 128, kManyThreads = 512;
constexpr int64_t kManyTokens = 1024;  // of the mean sequence, from which on a block has many threads
constexpr int kMaxWarps = kManyThreads / 32;

// The sums over the first `warps` of the block, in all its threads. `board` has room for those of each warp.
template <int count>
__device__ void block_sum(double (&sums)[count], unsigned warps, double* board) {
  const unsigned warp = threadIdx.x / 32;
  if (warp < warps) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      sums[i] = warp_reduce(sums[i], [](double a, double b) { return a + b; });
      if (threadIdx.x % 32 == 0) board[warp * count + i] = sums[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) {
    sums[i] = 0;
    for (unsigned each = 0; each < warps; ++each) sums[i] += board[each * count + i];
  }
  __syncthreads();
}

template <typename T>
struct Sequence {
  const LeewayTokens& tokens;
  const Recipe<T>& recipe;
  const T *logprob, *entropy;
  int64_t begin, end;

  // That have tokens.
  __device__ unsigned warps() const {
    const int64_t filled = (end - begin + 31) / 32, all = blockDim.x / 32;
    return static_cast<unsigned>(filled < all ? filled : all);
  }

  // `use(i, token i)` for each of the thread's tokens.
  template <typename Use>
  __device__ __forceinline__ void each(Use use) const {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      use(i, token(tokens, i, logprob[i], entropy == nullptr ? T(0) : entropy[i]));
    }
  }

  __device__ SequenceStats<T> stats(double* board) const {
    SequenceSums own;
    each([&](int64_t, const Token<T>& token) { add(own, token); });
    double sums[] = {own.count, own.log_ratio, own.log_rho};
    block_sum(sums, warps(), board);
    SequenceStats<T> stats = sequence_stats(recipe, {sums[0], sums[1], sums[2]});
    double pulls[] = {0};
    each([&](int64_t, const Token<T>& token) { pulls[0] += pull(recipe, token, stats); });
    block_sum(pulls, warps(), board);
    stats.pull = T(pulls[0]);
    return stats;
  }
};

template <typename T>
__global__ void __launch_bounds__(kManyThreads)
    terms_of_sequence(__grid_constant__ const LeewayTokens tokens, __grid_constant__ const Recipe<T> recipe,
                      bool sequence_level, int num_bins, const T* logprob, const T* entropy, LeewayTerms out) {
  auto* board = shared<double>();
  auto* bins = shared<unsigned>(kMaxWarps * LEEWAY_HEALTH * sizeof(double));
  const int64_t number = blockIdx.x;
  const int32_t* bounds = tokens.cu_seqlens + number;
  const Sequence<T> sequence{tokens, recipe, logprob, entropy, bounds[0], bounds[1]};
  for (int i = threadIdx.x; i < num_bins; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  const SequenceStats<T> stats = sequence_level ? sequence.stats(board) : SequenceStats<T>{};

  double sums[LEEWAY_HEALTH] = {};
  sequence.each([&](int64_t i, const Token<T>& token) {
    const Terms<T> made = terms(recipe, token, stats);
    store(out, i, made);
    if (out.health == nullptr || token.masked) return;
    health(token, made, is_own(tokens, i), sums);
    if (tokens.staleness != nullptr && num_bins > 0) atomicAdd(&bins[bin(tokens.staleness[i], num_bins)], 1u);
  });
  if (out.health == nullptr) return;
  block_sum(sums, sequence.warps(), board);
  double* row = out.health + number * (LEEWAY_HEALTH + num_bins);
#pragma unroll
  for (int i = 0; i < LEEWAY_HEALTH; ++i) {
    if (static_cast<int>(threadIdx.x) == i) row[i] = sums[i];
  }
  for (int i = threadIdx.x; i < num_bins; i += blockDim.x) row[LEEWAY_HEALTH + i] = bins[i];
}

template <typename T>
cudaError_t launch_terms(const LeewayTokens& tokens, const LeewayRecipe& given, const void* logprob,
                         const void* entropy, const LeewayTerms& out, void* stream) {
  const bool many = tokens.num_tokens >= kManyTokens * tokens.num_sequences;
  const size_t shared = kMaxWarps * LEEWAY_HEALTH * sizeof(double) + given.num_bins * sizeof(unsigned);
  const Shape shape{.grid = tokens.num_sequences, .block = many ? kManyThreads : kFewThreads, .shared = shared};
  return launch<terms_of_sequence<T>>(shape, stream, tokens, recipe<T>(given), is_sequence_level(given), given.num_bins,
                                      static_cast<const T*>(logprob), static_cast<const T*>(entropy), out);
}

}  // namespace
}  // namespace leeway

extern "C" int leeway_token_terms_cuda(const LeewayTokens* tokens, const LeewayRecipe* recipe, const void* logprob,
                                       const void* entropy, const LeewayTerms* out, void* stream) {
  if (tokens->num_sequences == 0) return cudaSuccess;
  const auto launch = tokens->type == LEEWAY_F64 ? leeway::launch_terms<double> : leeway::launch_terms<float>;
  return launch(*tokens, *recipe, logprob, entropy, *out, stream);
}

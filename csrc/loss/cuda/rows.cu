// Rows of logits on a GPU: their statistics, the loss of their targets and its gradient.
//
// A row's logits x count in powers of 2: with z = x log2(e) / temperature - offset, p = 2^z / mass. Each thread keeps
// sums against the greatest logit that it has met, so an element costs one exponential on its way in and one on its way
// out. Sums are merged in a fixed order.
//
// `row_loss` reads a row once: each block of a cluster holds a piece of it in shared memory, learns of the others' sums
// and writes the gradient, also to where the logits were. A row too long for that, as every long row is on a device
// without clusters, goes by one block that reads it twice, the second time mostly from L2.
//
// A target outside the vocabulary makes its row NaN: the host cannot look at it without waiting for the device.
#include <algorithm>
#include <cmath>

#include "../../common/vector.cuh"
#include "../token_loss.h"

namespace leeway {
namespace {

constexpr unsigned kThreads = 256;  // of a block that reads its logits once
template <typename X>               // of one that reads them twice: few rows at a time, that L2 holds them
constexpr unsigned kManyThreads = sizeof(X) == 8 ? 512 : 1024;
constexpr int kHeld = 3;                 // blocks a multiprocessor should have: some read while others write
constexpr int kStages = 4;               // in which a block's piece comes in
constexpr int kInFlight = 4;             // vectors that a thread without a piece loads before it uses the first
constexpr unsigned kMaxCluster = 8;
constexpr size_t kReserved = 1024;       // bytes of shared memory that the system takes for each block
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <typename T>
constexpr T kLowest = T(-1e30);  // an offset below all others, finite so that -inf less it is -inf
template <typename T>
constexpr T kNothing = T(-2000);  // 2^this is 0, or as good as, and 0 times it is 0

__device__ __forceinline__ float power_of_2(float z) {
#ifdef __CUDACC__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z));
  return power;
#else
  return std::exp2(z);
#endif
}
__device__ __forceinline__ double power_of_2(double z) { return std::exp2(z); }

// Of a NaN and a number the number.
__device__ __forceinline__ float greater(float a, float b) { return std::fmax(a, b); }
__device__ __forceinline__ double greater(double a, double b) { return std::fmax(a, b); }

// ---- Sums over a row

template <typename T>
struct Sums {
  T offset = kLowest<T>;
  T mass = 0;    // of 2^z
  T moment = 0;  // of z 2^z
};

template <typename T>
__device__ __forceinline__ Sums<T> moved(const Sums<T>& sums, T offset) {
  const T by = greater(sums.offset - offset, kNothing<T>);
  const T scale = power_of_2(by);
  return {offset, scale * sums.mass, scale * std::fma(by, sums.mass, sums.moment)};
}

template <typename T, int count>
__device__ __forceinline__ void add(Sums<T>& sums, const T (&x)[count], T scale) {
  T top = x[0];
#pragma unroll
  for (int i = 1; i < count; ++i) top = greater(top, x[i]);
  if (top * scale > sums.offset) sums = moved(sums, top * scale);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const T z = std::fma(x[i], scale, -sums.offset);
    const T power = power_of_2(z);
    sums.mass += power;
    sums.moment = std::fma(power, greater(z, kNothing<T>), sums.moment);
  }
}

template <typename T>
__device__ Sums<T> merge(const Sums<T>& a, const Sums<T>& b) {
  const T offset = greater(a.offset, b.offset);
  const Sums<T> x = moved(a, offset), y = moved(b, offset);
  return {offset, x.mass + y.mass, x.moment + y.moment};
}

template <typename T>
__device__ __forceinline__ Sums<T> warp_merge(const Sums<T>& sums) {
  const T offset = warp_reduce(sums.offset, [](T a, T b) { return greater(a, b); });
  const Sums<T> own = moved(sums, offset);
  const auto plus = [](T a, T b) { return a + b; };
  return {offset, warp_reduce(own.mass, plus), warp_reduce(own.moment, plus)};
}

// ---- What becomes of them

template <typename T>
struct Temperature {
  T in_bits, inverse;  // log2(e) / temperature, 1 / temperature

  explicit Temperature(double temperature) : in_bits(T(kLog2E / temperature)), inverse(T(1 / temperature)) {}
};

template <typename T>
struct Stats {
  T logprob, entropy, lse;
};

template <typename T>
__device__ Stats<T> stats_of(const Sums<T>& sums, T target, const Temperature<T>& temperature) {
  const T bits = sums.mass > 0 ? std::log2(sums.mass) : T(NAN), ln2 = T(kLn2);
  return {(std::fma(target, temperature.in_bits, -sums.offset) - bits) * ln2, (bits - sums.moment / sums.mass) * ln2,
          (sums.offset + bits) * ln2};
}

template <typename T>
__device__ void store(const LeewayRows& rows, int64_t row, const Stats<T>& stats) {
  static_cast<T*>(rows.logprob)[row] = stats.logprob;
  static_cast<T*>(rows.entropy)[row] = stats.entropy;
  static_cast<T*>(rows.lse)[row] = stats.lse;
}

// The gradient of a row: 2^z (constant + linear z), of the target `of_target`.
template <typename T>
struct Slope {
  T scale, offset, constant, linear, of_target;

  __device__ bool is_zero() const { return constant == 0 && linear == 0; }

  __device__ __forceinline__ T operator()(T x) const {
    const T z = std::fma(x, scale, -offset);
    return power_of_2(z) * std::fma(linear, greater(z, kNothing<T>), constant);
  }
};

// From c = d loss / d logprob and h = d loss / d entropy.
template <typename T>
__device__ Slope<T> slope_of(T c, T h, T logprob, T entropy, T offset, T mass, const Temperature<T>& temperature) {
  if (c == 0 && h == 0) return {};
  const T p = std::exp(logprob), share = -temperature.inverse / mass;
  const T of_entropy = p == 0 ? T(0) : p * (logprob + entropy);
  return {temperature.in_bits, offset, share * (c + h * (entropy - std::log(mass))), share * h * T(kLn2),
          -temperature.inverse * (c * std::expm1(logprob) + h * of_entropy)};
}

// ---- Pieces of rows. Thread t of a block has their vectors t, t + blockDim.x, ...

// Logits in global memory and where their gradient goes. Vectors from `whole` on are incomplete or not aligned.
template <typename X, typename G>
struct Piece {
  static constexpr int kCount = kPerVector<X>;
  const X* logits;
  G* grad;
  int64_t size, vectors, whole;

  __device__ Piece(const LeewayRows& rows, int64_t row, int64_t begin, int64_t most, bool aligned)
      : logits(static_cast<const X*>(rows.logits) + row * rows.logits_stride + begin),
        grad(rows.grad == nullptr ? nullptr : static_cast<G*>(rows.grad) + row * rows.grad_stride + begin),
        size(greater_or_0(rows.vocab - begin < most ? rows.vocab - begin : most)),
        vectors((size + kCount - 1) / kCount),
        whole(aligned ? size / kCount : 0) {}

  __device__ const uint4* at(int64_t v) const { return reinterpret_cast<const uint4*>(logits) + v; }

  // A vector beyond `whole`, its missing end filled up with what weighs nothing.
  __device__ uint4 gather(int64_t v) const {
    X each[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      each[i] = v * kCount + i < size ? logits[v * kCount + i] : narrow<X>(-INFINITY);
    }
    uint4 bits;
    memcpy(&bits, each, sizeof bits);
    return bits;
  }

  template <typename T>
  __device__ __forceinline__ void put(int64_t v, const T (&g)[kCount]) const {
    if (v < whole) {
      store_once(grad + v * kCount, g);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (v * kCount + i < size) grad[v * kCount + i] = narrow<G>(g[i]);
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void put(int64_t v, uint4 bits, const Slope<T>& slope) const {
    T x[kCount];
    unpack<X>(bits, x);
#pragma unroll
    for (T& each : x) each = slope(each);
    put(v, x);
  }

  template <typename T>
  __device__ void put_zeros() const {
    const T zeros[kCount] = {};
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) put(v, zeros);
  }

  // By the thread that has put the target's vector, after it.
  template <typename T>
  __device__ void put_target(int64_t at, T g) const {
    if (at >= 0 && at < size && at / kCount % blockDim.x == threadIdx.x) grad[at] = narrow<G>(g);
  }

  // `use(v, vector v)` for each of the thread's vectors, some loaded in advance; `loaded()` comes between, which may be
  // a barrier.
  template <typename Loaded, typename Use>
  __device__ __forceinline__ void stream(Loaded loaded, Use use) const {
    for (int64_t first = threadIdx.x; first - threadIdx.x < vectors; first += int64_t(kInFlight) * blockDim.x) {
      uint4 bits[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t v = first + i * blockDim.x;
        if (v < whole) bits[i] = *at(v);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t v = first + i * blockDim.x;
        if (v >= whole && v < vectors) bits[i] = gather(v);
      }
      loaded();
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t v = first + i * blockDim.x;
        if (v < vectors) use(v, bits[i]);
      }
    }
  }

 private:
  __device__ static int64_t greater_or_0(int64_t n) { return n > 0 ? n : 0; }
};

template <typename T, typename X, typename G>
__device__ __forceinline__ Sums<T> stream_sums(const Piece<X, G>& piece, T scale) {
  Sums<T> sums;
  piece.stream([] {},
               [&](int64_t, uint4 bits) {
                 T x[kPerVector<X>];
                 unpack<X>(bits, x);
                 add(sums, x, scale);
               });
  return sums;
}

template <typename T, typename X, typename G>
__device__ __forceinline__ void stream_slopes(const Piece<X, G>& piece, const Slope<T>& slope) {
  // A narrower gradient may overlay the logits: it reaches no further than what the block has loaded.
  const auto loaded = [] {
    if constexpr (sizeof(G) < sizeof(X)) __syncthreads();
  };
  piece.stream(loaded, [&](int64_t v, uint4 bits) { piece.put(v, bits, slope); });
}

template <typename X, typename G>
__device__ __forceinline__ int vectors_of_stage(const Piece<X, G>& piece) {
  const int step = kStages * static_cast<int>(blockDim.x);
  return (static_cast<int>(piece.vectors) + step - 1) / step;
}

// Sends for the thread's vectors, which come to `held` in stages.
template <typename X, typename G>
__device__ __forceinline__ void hold(const Piece<X, G>& piece, uint4* held) {
  const int count = vectors_of_stage(piece);
  int64_t v = threadIdx.x;
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll 1
    for (int i = 0; i < count; ++i, v += blockDim.x) {
      if (v < piece.whole) {
        copy_async(held + v, piece.at(v));
      } else if (v < piece.vectors) {
        held[v] = piece.gather(v);
      }
    }
    copy_async_commit();
  }
}

// Over what `hold` has sent for, while the later stages are on their way.
template <typename T, typename X, typename G>
__device__ __forceinline__ Sums<T> held_sums(const Piece<X, G>& piece, const uint4* held, T scale) {
  const int count = vectors_of_stage(piece), vectors = static_cast<int>(piece.vectors);
  Sums<T> sums;
  int v = static_cast<int>(threadIdx.x);
  const auto add_stage = [&] {
#pragma unroll 2
    for (int i = 0; i < count && v < vectors; ++i, v += static_cast<int>(blockDim.x)) {
      T x[kPerVector<X>];
      unpack<X>(held[v], x);
      add(sums, x, scale);
    }
  };
  static_assert(kStages == 4);
  copy_async_wait<3>();
  add_stage();
  copy_async_wait<2>();
  add_stage();
  copy_async_wait<1>();
  add_stage();
  copy_async_wait<0>();
  add_stage();
  return sums;
}

// ---- What the threads of a block tell each other, at the start of its shared memory.

template <typename T>
struct Board {
  Sums<T> warps[kManyThreads<T> / 32];
  Slope<T> slope;
};
constexpr size_t kBoard = 512;  // bytes, with what aligns the piece behind it
static_assert(sizeof(Board<double>) <= kBoard);

// The sums over all threads of the cluster, in every lane of the first warp of each block.
template <typename T>
__device__ Sums<T> cluster_merge(const Sums<T>& own) {
  auto* board = shared<Board<T>>();
  const Sums<T> sums = warp_merge(own);
  const unsigned warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) board->warps[threadIdx.x / 32] = sums;
  cluster_arrive();
  cluster_wait();
  Sums<T> all;
  if (threadIdx.x >= 32) return all;
  for (unsigned i = lane; i < cluster_size() * warps; i += 32) {
    all = merge(all, *cluster_map(&board->warps[i % warps], i / warps));
  }
  return warp_merge(all);
}

template <typename X>
__device__ Wide<X> target_logit(const LeewayRows& rows, int64_t row, int64_t target) {
  if (target < 0 || target >= rows.vocab) return Wide<X>(NAN);
  return widen(static_cast<const X*>(rows.logits)[row * rows.logits_stride + target]);
}

// ---- Kernels

template <typename X, typename T = Wide<X>>
__global__ void __launch_bounds__(kThreads, 4) stats_of_row(LeewayRows rows, Temperature<T> temperature, bool aligned) {
  const int64_t row = blockIdx.x;
  const Piece<X, X> piece(rows, row, 0, rows.vocab, aligned);
  const Sums<T> sums = cluster_merge(stream_sums(piece, temperature.in_bits));
  if (threadIdx.x != 0) return;
  store(rows, row, stats_of(sums, target_logit<X>(rows, row, rows.targets[row]), temperature));
}

template <typename X, typename G, typename T = Wide<X>>
__global__ void __launch_bounds__(kThreads, sizeof(X) == 8 ? 2 : 4)
    grad_of_row(LeewayRows rows, Temperature<T> temperature, bool aligned) {
  const int64_t row = blockIdx.x, target = rows.targets[row];
  const auto at = [row](const void* array) { return array == nullptr ? T(0) : static_cast<const T*>(array)[row]; };
  const Piece<X, G> piece(rows, row, 0, rows.vocab, aligned);
  const T offset = at(rows.lse) * T(kLog2E);
  const T logprob = std::fma(target_logit<X>(rows, row, target), temperature.in_bits, -offset) * T(kLn2);
  const Slope<T> slope =
      slope_of(at(rows.slope_logprob), at(rows.slope_entropy), logprob, at(rows.entropy), offset, T(1), temperature);
  if (slope.is_zero()) {
    piece.template put_zeros<T>();
    return;
  }
  __syncthreads();  // all have looked at the target's logit, which may soon be overwritten
  stream_slopes(piece, slope);
  piece.put_target(target, slope.of_target);
}

template <typename X, typename G, bool held, typename T = Wide<X>>
__global__ void __launch_bounds__(held ? kThreads : kManyThreads<X>, held ? kHeld : 1)
    loss_of_row(LeewayRows rows, LeewayTokens tokens, __grid_constant__ const Recipe<T> recipe,
                Temperature<T> temperature, int64_t piece_size, bool aligned) {
  auto* board = shared<Board<T>>();
  auto* vectors = shared<uint4>(kBoard);
  const int64_t row = blockIdx.x / cluster_size(), begin = cluster_rank() * piece_size, target = rows.targets[row];
  const Piece<X, G> piece(rows, row, begin, piece_size, aligned);
  if (static_cast<const T*>(tokens.mask)[row] == 0) {
    if (threadIdx.x == 0 && begin == 0) store(rows, row, Stats<T>{});
    if (rows.grad != nullptr) piece.template put_zeros<T>();
    return;
  }
  if (held) hold(piece, vectors);
  const T logit = target_logit<X>(rows, row, target);
  const T scale = temperature.in_bits;
  const Sums<T> sums = cluster_merge(held ? held_sums(piece, vectors, scale) : stream_sums(piece, scale));
  if (threadIdx.x == 0) {
    const Stats<T> stats = stats_of(sums, logit, temperature);
    if (begin == 0) store(rows, row, stats);
    const Terms<T> made = terms(recipe, token(tokens, row, stats.logprob, stats.entropy), SequenceStats<T>{});
    board->slope = slope_of(made.coefficient, made.slope_entropy, stats.logprob, stats.entropy, sums.offset, sums.mass,
                            temperature);
  }
  cluster_arrive();  // has looked at the others' boards
  __syncthreads();
  if (rows.grad != nullptr) {
    const Slope<T> slope = board->slope;
    if (slope.is_zero()) {
      piece.template put_zeros<T>();
    } else if (held) {
#pragma unroll 2
      for (int v = threadIdx.x; v < static_cast<int>(piece.vectors); v += blockDim.x) piece.put(v, vectors[v], slope);
    } else {
      stream_slopes(piece, slope);
    }
    piece.put_target(target - begin, slope.of_target);
  }
  cluster_wait();
}

// ---- Launches

bool is_aligned(const void* base, int64_t stride, size_t size, size_t to) {
  return base == nullptr || (reinterpret_cast<uintptr_t>(base) % to == 0 && stride * size % to == 0);
}

// Whether all rows' vectors are, both where they come from and where they go to.
template <typename X, typename G>
bool is_aligned(const LeewayRows& rows) {
  return is_aligned(rows.logits, rows.logits_stride, sizeof(X), 16) &&
         is_aligned(rows.grad, rows.grad_stride, sizeof(G), std::min<size_t>(16, kPerVector<X> * sizeof(G)));
}

struct Division {      // of a row among the blocks of a cluster
  unsigned cluster;    // 0: too long
  int64_t piece_size;  // logits, in whole cache lines
  size_t shared;       // bytes of each block
};

// The smallest cluster whose pieces leave room for `kHeld` blocks on a multiprocessor, or fewer.
Division divide(int64_t vocab, size_t logit) {
  const size_t in_all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const size_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const unsigned max_cluster = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kMaxCluster : 1;
  const int64_t line = 128 / logit;
  for (int blocks = kHeld; blocks > 0; --blocks) {
    for (unsigned cluster = 1; cluster <= max_cluster; cluster *= 2) {
      const int64_t piece_size = (vocab + cluster * line - 1) / (cluster * line) * line;
      const size_t shared = kBoard + piece_size * logit;
      if (shared <= most && blocks * (shared + kReserved) <= in_all) return {cluster, piece_size, shared};
    }
  }
  return {0, vocab, kBoard};
}

template <typename Call>
cudaError_t with_type(LeewayType type, Call call) {
  switch (type) {
    case LEEWAY_F32: return call.template operator()<float>();
    case LEEWAY_BF16: return call.template operator()<Bf16>();
    case LEEWAY_F16: return call.template operator()<F16>();
    default: return cudaErrorInvalidValue;
  }
}

// call.operator()<X, G>() for the types of logits and gradient; double goes with double alone.
template <typename Call>
cudaError_t with_types(LeewayType logits, LeewayType grad, Call call) {
  if (logits == LEEWAY_F64 && grad == LEEWAY_F64) return call.template operator()<double, double>();
  return with_type(logits, [&]<typename X>() {
    return with_type(grad, [&]<typename G>() { return call.template operator()<X, G>(); });
  });
}

template <typename X>
cudaError_t launch_stats(LeewayRows rows, void* stream) {
  rows.grad = nullptr;
  const Shape shape{.grid = rows.num_rows, .block = kThreads, .shared = kBoard};
  const Temperature<Wide<X>> temperature(rows.temperature);
  return launch<stats_of_row<X>>(shape, stream, rows, temperature, is_aligned<X, X>(rows));
}

template <typename X, typename G>
cudaError_t launch_grad(const LeewayRows& rows, void* stream) {
  const Shape shape{.grid = rows.num_rows, .block = kThreads};
  const Temperature<Wide<X>> temperature(rows.temperature);
  return launch<grad_of_row<X, G>>(shape, stream, rows, temperature, is_aligned<X, G>(rows));
}

template <typename X, typename G>
cudaError_t launch_loss(const LeewayRows& rows, const LeewayTokens& tokens, const LeewayRecipe& given, void* stream) {
  const Recipe<Wide<X>> recipe = leeway::recipe<Wide<X>>(given);
  const Temperature<Wide<X>> temperature(rows.temperature);
  const bool aligned = is_aligned<X, G>(rows);
  const auto [cluster, piece_size, shared] = divide(rows.vocab, sizeof(X));
  if (cluster == 0) {
    const Shape shape{.grid = rows.num_rows, .block = kManyThreads<X>, .shared = shared};
    return launch<loss_of_row<X, G, false>>(shape, stream, rows, tokens, recipe, temperature, piece_size, aligned);
  }
  const Shape shape{.grid = rows.num_rows * cluster, .block = kThreads, .cluster = cluster, .shared = shared};
  return launch<loss_of_row<X, G, true>>(shape, stream, rows, tokens, recipe, temperature, piece_size, aligned);
}

}  // namespace
}  // namespace leeway

extern "C" {

int leeway_row_stats_cuda(const LeewayRows* rows, void* stream) {
  if (rows->num_rows == 0) return cudaSuccess;
  const auto launch = [&]<typename X>() { return leeway::launch_stats<X>(*rows, stream); };
  return rows->logits_type == LEEWAY_F64 ? launch.operator()<double>() : leeway::with_type(rows->logits_type, launch);
}

int leeway_row_grad_cuda(const LeewayRows* rows, void* stream) {
  if (rows->num_rows == 0) return cudaSuccess;
  return leeway::with_types(rows->logits_type, rows->grad_type,
                            [&]<typename X, typename G>() { return leeway::launch_grad<X, G>(*rows, stream); });
}

int leeway_row_loss_cuda(const LeewayRows* rows, const LeewayTokens* tokens, const LeewayRecipe* recipe, void* stream) {
  if (rows->num_rows == 0) return cudaSuccess;
  return leeway::with_types(rows->logits_type, rows->grad_type, [&]<typename X, typename G>() {
    return leeway::launch_loss<X, G>(*rows, *tokens, *recipe, stream);
  });
}

}  // extern "C"

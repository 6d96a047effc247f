// Numbers of any type, 16 bytes at a time: float (double for double) in registers, their own type in memory.
#pragma once

#include <type_traits>

#include "bf16.h"
#include "cuda.cuh"

namespace leeway {

template <typename X>
constexpr int kPerVector = 16 / sizeof(X);

template <typename X>
using Wide = std::conditional_t<std::is_same_v<X, double>, double, float>;

template <typename X>
__device__ __forceinline__ Wide<X> widen(X x) {
  if constexpr (std::is_same_v<X, double>) {
    return x;
  } else {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<X, F16>) {
      float wide;
      asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
      return wide;
    }
#endif
    return to_float(x);
  }
}

template <typename X>
__device__ __forceinline__ X narrow(Wide<X> x) {
  X to;
  if constexpr (std::is_same_v<X, double>) {
    to = x;
  } else {
    from_float(x, to);
  }
  return to;
}

// Two numbers of 16 bits, the first one in the low half.
template <typename X>
__device__ __forceinline__ uint32_t pack(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t both;
  if constexpr (std::is_same_v<X, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
  return both;
#else
  return narrow<X>(first).bits | uint32_t(narrow<X>(second).bits) << 16;
#endif
}

template <typename X>
__device__ __forceinline__ void unpack(uint4 bits, Wide<X> (&x)[kPerVector<X>]) {
  X each[kPerVector<X>];
  memcpy(each, &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < kPerVector<X>; ++i) x[i] = widen(each[i]);
}

// To `to`, which is aligned to all that it takes or to 16 bytes; no cache need keep it.
template <typename X, typename T, int count>
__device__ __forceinline__ void store_once(X* to, const T (&x)[count]) {
  constexpr int kWords = count * sizeof(X) / 4;
  uint32_t words[kWords];
  if constexpr (sizeof(X) == 2) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = pack<X>(x[2 * i], x[2 * i + 1]);
  } else {
    memcpy(words, x, sizeof words);
  }
  if constexpr (kWords == 2) {
    store8_once(to, {words[0], words[1]});
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      store16_once(reinterpret_cast<uint32_t*>(to) + i, {words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
  }
}

}  // namespace leeway

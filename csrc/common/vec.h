// Vectors of floats in the instruction set that isa.h has chosen: the compiler's own, whose operators work by element,
// and what those lack. Loads and stores need no alignment.
#pragma once

#include "isa.h"

#define LEEWAY_INLINE static inline __attribute__((always_inline))

namespace leeway::LEEWAY_ISA {

constexpr int kLanes = LEEWAY_LANES;

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));  // half-precision numbers, as bits

LEEWAY_INLINE F splat(float x) { return x - F{}; }

template <typename To, typename From>
LEEWAY_INLINE To bits(From x) {
  return __builtin_bit_cast(To, x);
}

// `greater` is the second of a pair where one is NaN.
#if LEEWAY_X86 == 16
LEEWAY_INLINE F greater(F a, F b) { return bits<F>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b))); }
LEEWAY_INLINE U widen(H x) { return bits<U>(_mm512_cvtepu16_epi32(bits<__m256i>(x))); }
LEEWAY_INLINE H narrow(U x) { return bits<H>(_mm512_cvtepi32_epi16(bits<__m512i>(x))); }
LEEWAY_INLINE F from_f16(H x) { return bits<F>(_mm512_cvtph_ps(bits<__m256i>(x))); }
LEEWAY_INLINE H to_f16(F x) { return bits<H>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT)); }
#elif LEEWAY_X86 == 8
LEEWAY_INLINE F greater(F a, F b) { return bits<F>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b))); }
LEEWAY_INLINE U widen(H x) { return bits<U>(_mm256_cvtepu16_epi32(bits<__m128i>(x))); }
LEEWAY_INLINE H narrow(U x) {
  const __m256i packed = _mm256_packus_epi32(bits<__m256i>(x), _mm256_setzero_si256());  // within each half
  return bits<H>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
LEEWAY_INLINE F from_f16(H x) { return bits<F>(_mm256_cvtph_ps(bits<__m128i>(x))); }
LEEWAY_INLINE H to_f16(F x) { return bits<H>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT)); }
#else
LEEWAY_INLINE F greater(F a, F b) { return a > b ? a : b; }
LEEWAY_INLINE U widen(H x) { return __builtin_convertvector(x, U); }
LEEWAY_INLINE H narrow(U x) { return __builtin_convertvector(x, H); }
LEEWAY_INLINE F from_f16(H x) {
  F wide{};
  for (int i = 0; i < kLanes; ++i) wide[i] = to_float(F16{x[i]});
  return wide;
}
LEEWAY_INLINE H to_f16(F x) {
  H narrow{};
  for (int i = 0; i < kLanes; ++i) {
    F16 lane;
    from_float(x[i], lane);
    narrow[i] = lane.bits;
  }
  return narrow;
}
#endif

template <typename Two>
LEEWAY_INLINE float fold(F x, Two of_two) {
  float lanes[kLanes];
  memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = of_two(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}

LEEWAY_INLINE float sum(F x) {
  return fold(x, [](float a, float b) { return a + b; });
}
LEEWAY_INLINE float greatest(F x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}

// kLanes numbers as they are stored, and as floats.
LEEWAY_INLINE F stored(F x, float) { return x; }
LEEWAY_INLINE H stored(F x, F16) { return to_f16(x); }
LEEWAY_INLINE U bf16_bits(F x) {
  const U b = bits<U>(x);
  const U rounded = b + 0x7fff + (b >> 16 & 1);
  return (x != x ? b | 0x400000 : rounded) >> 16;
}
LEEWAY_INLINE H stored(F x, Bf16) { return narrow(bf16_bits(x)); }

LEEWAY_INLINE F load(const float* from) {
  F x;
  memcpy(&x, from, sizeof x);
  return x;
}
LEEWAY_INLINE H load_half(const void* from) {
  H x;
  memcpy(&x, from, sizeof x);
  return x;
}
LEEWAY_INLINE F load(const F16* from) { return from_f16(load_half(from)); }
LEEWAY_INLINE F load(const Bf16* from) { return bits<F>(widen(load_half(from)) << 16); }

template <typename X>
LEEWAY_INLINE void store(X* to, F x) {
  const auto as = stored(x, X{});
  memcpy(to, &as, sizeof as);
}

// Past the cache: for results that are not read again soon. `to` is aligned to the size of what is stored; other
// threads see it after `fence`.
template <typename X>
LEEWAY_INLINE void stream(X* to, F x) {
  const auto as = stored(x, X{});
#if LEEWAY_X86 > 0
  if constexpr (sizeof as == 8) _mm_stream_si64(reinterpret_cast<long long*>(to), bits<long long>(as));
  if constexpr (sizeof as == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits<__m128i>(as));
#else
  memcpy(to, &as, sizeof as);
#endif
#if LEEWAY_X86 >= 8
  if constexpr (sizeof as == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits<__m256i>(as));
#endif
#if LEEWAY_X86 >= 16
  if constexpr (sizeof as == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits<__m512i>(as));
#endif
}

LEEWAY_INLINE void fence() {
#if LEEWAY_X86 > 0
  _mm_sfence();
#endif
}

}  // namespace leeway::LEEWAY_ISA

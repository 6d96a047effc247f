// Vectors of the checksum's words, and of numbers as only buckets hold them.
#pragma once

#include "../common/vec.h"

namespace leeway::LEEWAY_ISA {

typedef uint64_t W __attribute__((vector_size(4 * kLanes)));
constexpr int64_t kWords = kLanes / 2;

LEEWAY_INLINE W load_words(const uint8_t* from) {
  W x;
  memcpy(&x, from, sizeof x);
  return x;
}

// `differing`: one bit for each unit of 2 bytes, the first the lowest. `joined`: the low halves of all numbers of `a`,
// then of `b`, which are below 65,536.
#if LEEWAY_X86 == 16
LEEWAY_INLINE W joined(U a, U b) {
  return bits<W>(_mm512_inserti64x4(_mm512_castsi256_si512(bits<__m256i>(narrow(a))), bits<__m256i>(narrow(b)), 1));
}
LEEWAY_INLINE W swap_halves(W x) { return bits<W>(_mm512_shuffle_epi32(bits<__m512i>(x), _MM_PERM_CDAB)); }
LEEWAY_INLINE W product_of_lows(W a, W b) { return bits<W>(_mm512_mul_epu32(bits<__m512i>(a), bits<__m512i>(b))); }
LEEWAY_INLINE uint32_t differing(W a, W b) { return _mm512_cmpneq_epi16_mask(bits<__m512i>(a), bits<__m512i>(b)); }
#elif LEEWAY_X86 == 8
LEEWAY_INLINE W joined(U a, U b) {
  const __m256i packed = _mm256_packus_epi32(bits<__m256i>(a), bits<__m256i>(b));  // within each half
  return bits<W>(_mm256_permute4x64_epi64(packed, 0xd8));
}
LEEWAY_INLINE W swap_halves(W x) { return bits<W>(_mm256_shuffle_epi32(bits<__m256i>(x), 0xb1)); }
LEEWAY_INLINE W product_of_lows(W a, W b) { return bits<W>(_mm256_mul_epu32(bits<__m256i>(a), bits<__m256i>(b))); }
LEEWAY_INLINE uint32_t differing(W a, W b) {
  const __m256i same = _mm256_cmpeq_epi16(bits<__m256i>(a), bits<__m256i>(b));
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(same), _mm256_extracti128_si256(same, 1));
  return uint32_t(_mm_movemask_epi8(bytes)) ^ 0xffff;
}
#else
LEEWAY_INLINE W joined(U a, U b) {
  const H halves[] = {narrow(a), narrow(b)};
  return load_words(reinterpret_cast<const uint8_t*>(halves));
}
LEEWAY_INLINE W swap_halves(W x) { return x << 32 | x >> 32; }
LEEWAY_INLINE W product_of_lows(W a, W b) { return (a & 0xffffffff) * (b & 0xffffffff); }
LEEWAY_INLINE uint32_t differing(W a, W b) {
  typedef uint16_t Units __attribute__((vector_size(sizeof(W))));
  if (((a[0] ^ b[0]) | (a[1] ^ b[1])) == 0) return 0;
  const Units difference = bits<Units>(a ^ b);
  uint32_t mask = 0;
  for (unsigned i = 0; i < sizeof(W) / 2; ++i) mask |= uint32_t(difference[i] != 0) << i;
  return mask;
}
#endif

LEEWAY_INLINE W mix(W word, W key) {
  const W x = word ^ key, other = swap_halves(x);
  const W y = product_of_lows(x, other) + x, swapped = swap_halves(y);
  return product_of_lows(y, swapped) + swapped + x;
}

LEEWAY_INLINE F load(const double* from) {
  typedef double D __attribute__((vector_size(8 * kLanes)));
  D x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, F);
}

LEEWAY_INLINE void store(Fp8* to, F x) {
  typedef uint8_t B __attribute__((vector_size(kLanes)));
  const I sign = bits<I>(x) >> 24 & 0x80;
  const I magnitude = bits<I>(x) & 0x7fffffff;
  const I small = bits<I>(bits<F>(magnitude) + kFp8Grain) - int32_t(kFp8GrainBits);
  I rounded = (magnitude - int32_t(kFp8Bias) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  rounded = magnitude < int32_t(kFp8Normal) ? small : rounded;
  rounded = magnitude >= 0x43e00000 ? I{} + 0x7e : rounded;
  const I result = magnitude >= 0x7f800000 ? I{} + 0x7f : rounded | sign;
  const B bytes = __builtin_convertvector(narrow(bits<U>(result)), B);
  memcpy(to, &bytes, sizeof bytes);
}

}  // namespace leeway::LEEWAY_ISA

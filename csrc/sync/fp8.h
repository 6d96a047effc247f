// fp8 numbers, e4m3fn: a sign, 4 bits of exponent, 3 of mantissa; up to 448, no infinity, one NaN.
#pragma once

#include "../common/bf16.h"

namespace leeway {

struct Fp8 {
  uint8_t bits;
};

constexpr float kFp8Top = 448;
constexpr uint32_t kFp8Normal = 0x3c800000;   // 2^-6 as a float: below, numbers are multiples of 2^-9
constexpr uint32_t kFp8Bias = 0x3c000000;     // the difference of the exponents' biases
constexpr float kFp8Grain = 0x1p14f;          // a float here has the last place 2^-9
constexpr uint32_t kFp8GrainBits = 0x46800000;

// To nearest, ties to even; beyond 448 to 448; NaN and infinity to NaN, its sign left out: devices differ in the sign
// that a quotient of NaN has.
LEEWAY_HD void from_float(float x, Fp8& to) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 24 & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t rounded = (magnitude - kFp8Bias + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  if (magnitude < kFp8Normal) rounded = bits_of(of_bits(magnitude) + kFp8Grain) - kFp8GrainBits;
  if (magnitude >= 0x43e00000) rounded = 0x7e;  // 448
  to.bits = magnitude >= 0x7f800000 ? 0x7f : uint8_t(sign | rounded);
}

// Of a tile whose greatest finite magnitude is `top`.
LEEWAY_HD float fp8_scale(float top) {
  const float scale = top / kFp8Top;
  return scale < 0x1p-126f ? 1.0f : scale;
}

// A double as CPUs narrow it: to nearest, ties to even; a NaN keeps its sign and first bits.
LEEWAY_HD float to_float(double x) {
  if (x == x) return float(x);
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return of_bits(uint32_t(bits >> 32 & 0x80000000) | 0x7fc00000 | uint32_t(bits >> 29 & 0x3fffff));
}

}  // namespace leeway

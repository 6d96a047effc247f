// Half-precision numbers as their bits, converted on the host and on CUDA alike. To bf16 and fp16: to nearest, ties to
// even, NaN stays NaN.
#pragma once

#include <stdint.h>
#include <string.h>

#include "device.h"

namespace leeway {

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

LEEWAY_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

LEEWAY_HD float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

LEEWAY_HD float to_float(float x) { return x; }

LEEWAY_HD float to_float(Bf16 x) { return of_bits(uint32_t(x.bits) << 16); }

LEEWAY_HD float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // As a float of the same bits, the number is too small by the difference of the exponents' biases: 2^112.
  return of_bits(sign | bits_of(of_bits(magnitude << 13) * 0x1p112f));
}

LEEWAY_HD void from_float(float x, float& to) { to = x; }

LEEWAY_HD void from_float(float x, Bf16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

LEEWAY_HD void from_float(float x, F16& to) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    to.bits = uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  } else if (magnitude >= 0x477ff000) {  // 65520, halfway from the largest number to what would follow
    to.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // 2^-14: below, adding 1/2 leaves the bits of a multiple of 2^-24 at the end
    to.bits = uint16_t(sign | (bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000));
  } else {
    to.bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}

}  // namespace leeway

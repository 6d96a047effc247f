// The exponential function of a vector.
#pragma once

#include "vec.h"

namespace leeway::LEEWAY_ISA {

constexpr float kExpLowest = -88;  // whose exponential is taken for 0: it has left the normal numbers

// exp(x) for kExpLowest <= x <= 88, within 2 units in the last place; NaN of NaN.
//
// x = n log 2 + f with |f| <= log(2) / 2, so exp(x) = 2^n exp(f). The polynomial of degree 6 is the best approximation
// of exp(f) relative to it, its error 1.6e-9. The float nearest to log 2 is so near (2e-9) that one is enough.
LEEWAY_INLINE F exp(F x) {
  const float magic = 0x1.8p23f;  // a float this large has its last bit at 1: adding it rounds
  const F shifted = x * 0x1.715476p0f + magic;
  const F f = x - (shifted - magic) * 0x1.62e43p-1f;
  const F f2 = f * f;  // three short chains keep more vectors in flight than one long one
  F p = f2 * 0x1.6ab98p-10f + (f * 0x1.126d0cp-7f + 0x1.55589ap-5f);
  p = p * f2 + (f * 0x1.55540ap-3f + 0x1.fffffap-2f);
  p = p * f2 + (f + 1);
  return p * bits<F>((bits<U>(shifted) << 23) + 0x3f800000);  // 2^n, and 0 for n = -127
}

}  // namespace leeway::LEEWAY_ISA

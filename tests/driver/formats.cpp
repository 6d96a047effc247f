// Conversions between the formats of numbers, against their definitions.
#include <cmath>

#include "../../csrc/common/bf16.h"
#include "driver.h"

namespace {

struct Format {
  int mantissa_bits, bias;
};
constexpr Format kBf16 = {7, 127}, kF16 = {10, 15};

double defined(Format format, uint16_t bits) {
  const int exponent = (bits & 0x7fff) >> format.mantissa_bits;
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (0x7fff >> format.mantissa_bits)) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - format.bias - format.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << format.mantissa_bits), exponent - format.bias - format.mantissa_bits);
}

// Every number of the format, the numbers halfway to the next, and their neighbours.
template <typename Half>
void check(Format format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{uint16_t(bits)};
    const double value = defined(format, half.bits);
    const float wide = leeway::to_float(half);
    Half back;
    leeway::from_float(wide, back);
    if (value != value) {
      REQUIRE(wide != wide, "%x", bits);
      REQUIRE(std::isnan(defined(format, back.bits)), "%x became %x", bits, back.bits);
      continue;
    }
    REQUIRE(wide == value && std::signbit(wide) == std::signbit(value), "%x", bits);
    REQUIRE(back.bits == half.bits, "%x became %x", bits, back.bits);
    if (std::isinf(value)) continue;

    // The next number's place counts as a number, though it may stand for infinity.
    const uint16_t up = half.bits + 1;
    const bool last = std::isinf(defined(format, up));
    const double spacing = std::fabs(value - defined(format, last ? half.bits - 1 : up));
    const float halfway = float(value + std::copysign(spacing / 2, value));
    const uint16_t even = half.bits & 1 ? up : half.bits;
    Half rounded;
    leeway::from_float(halfway, rounded);
    REQUIRE(rounded.bits == even, "halfway from %x became %x", bits, rounded.bits);
    leeway::from_float(std::nextafter(halfway, 0.0f), rounded);
    REQUIRE(rounded.bits == half.bits, "below halfway from %x became %x", bits, rounded.bits);
    leeway::from_float(std::nextafter(halfway, std::copysign(INFINITY, halfway)), rounded);
    REQUIRE(rounded.bits == up, "above halfway from %x became %x", bits, rounded.bits);
  }
}

}  // namespace

CHECK(formats_are_converted_as_defined) {
  check<leeway::Bf16>(kBf16);
  check<leeway::F16>(kF16);
}

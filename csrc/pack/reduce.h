// What a reduction over a sequence keeps while it goes over the tokens.
#pragma once

#include <math.h>

#include "../api/pack.h"
#include "../common/device.h"

namespace leeway {

template <bool greatest>
struct Part {
  double value, count;

  static LEEWAY_HD Part none() { return {greatest ? -HUGE_VAL : 0.0, 0.0}; }

  // A value that does not count may be anything.
  LEEWAY_HD Part with(double value, double mask) const {
    return mask == 0 ? *this : join({greatest ? value : value * mask, mask});
  }

  // NaN is the greatest, as torch.amax has it.
  LEEWAY_HD Part join(const Part& other) const {
    const double sum = value + other.value, larger = value >= other.value || value != value ? value : other.value;
    return {greatest ? larger : sum, count + other.count};
  }

  LEEWAY_HD double result(LeewayReduction reduction) const {
    return reduction == LEEWAY_MEAN ? value / (count < 1 ? 1 : count) : value;
  }
};

}  // namespace leeway

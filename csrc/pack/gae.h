// One token of generalised advantage estimation (arXiv:1506.02438), with one lambda for the critic's targets and one for
// the policy's advantages (arXiv:2504.05118).
#pragma once

#include "../common/device.h"

namespace leeway {

struct Decay {
  double gamma, critic, policy;  // gamma, and gamma lambda of each
};

// What a token passes on to the one before it.
struct Carry {
  double value, critic, policy;  // V, and A of each lambda

  LEEWAY_HD Carry before(double reward, double value, const Decay& decay) const {
    const double delta = surprise(reward, this->value, value, decay);
    return {value, delta + decay.critic * critic, delta + decay.policy * policy};
  }

  static LEEWAY_HD double surprise(double reward, double following, double value, const Decay& decay) {
    return reward + decay.gamma * following - value;
  }
};

}  // namespace leeway

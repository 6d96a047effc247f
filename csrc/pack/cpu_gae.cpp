// Generalised advantages: one pass from the last token of a sequence to its first.
#include "../api/pack.h"
#include "gae.h"

namespace leeway {
namespace {

template <typename T>
void gae(const LeewayGae& args, int64_t i) {
  const auto at = [i](const void* values, double otherwise) -> double {
    return values ? static_cast<const T*>(values)[i] : otherwise;
  };
  const Decay decay{args.gamma, args.gamma * at(args.lambda_critic, 1), args.gamma * at(args.lambda_policy, 1)};
  const T* rewards = static_cast<const T*>(args.rewards);
  const T* values = static_cast<const T*>(args.values);
  const T* mask = static_cast<const T*>(args.mask);
  T* advantages = static_cast<T*>(args.advantages);
  T* returns = static_cast<T*>(args.returns);

  Carry carry{at(args.bootstrap, 0), 0, 0};
  for (int64_t t = int64_t(args.packed.cu_seqlens[i + 1]) - 1; t >= args.packed.cu_seqlens[i]; --t) {
    if (!mask || mask[t] != 0) carry = carry.before(rewards[t], values[t], decay);
    advantages[t] = static_cast<T>(carry.policy);
    returns[t] = static_cast<T>(carry.critic + values[t]);
  }
}

}  // namespace
}  // namespace leeway

void leeway_gae_cpu(const LeewayGae* args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args->type == LEEWAY_F64 ? leeway::gae<double>(*args, i) : leeway::gae<float>(*args, i);
  }
}

// Per-token columns from sequences, and reductions over sequences.
#include <cmath>

#include "reduce.h"

namespace leeway {
namespace {

constexpr int kLanes = 8;  // partial sums that advance together; their number is part of the result's last bits
constexpr int64_t kIgnored = -100;

void layout(const LeewayTokenLayout& args, int64_t i) {
  const int64_t begin = args.packed.cu_seqlens[i], end = args.packed.cu_seqlens[i + 1];
  for (int64_t t = begin; t < end; ++t) {
    const bool predicts = t + 1 < end && t + 1 - begin >= args.prompt_lengths[i];
    args.position_ids[t] = t - begin;
    args.labels[t] = predicts ? args.tokens[t + 1] : kIgnored;
    args.mask[t] = predicts ? 1.0f : 0.0f;
    args.sequence[t] = i;
  }
}

template <typename T, bool greatest, bool masked>
Part<greatest> reduce(const T* values, const T* mask, int64_t num) {
  Part<greatest> lanes[kLanes];
  for (auto& lane : lanes) lane = Part<greatest>::none();
  int64_t t = 0;
  for (; t + kLanes <= num; t += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = lanes[k].with(values[t + k], masked ? mask[t + k] : T(1));
  }
  for (int k = 0; t + k < num; ++k) lanes[k] = lanes[k].with(values[t + k], masked ? mask[t + k] : T(1));
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int k = 0; k < step; ++k) lanes[k] = lanes[k].join(lanes[k + step]);
  }
  return lanes[0];
}

template <typename T, bool greatest>
void reduce(const LeewayReduce& args, int64_t i) {
  const int64_t begin = args.packed.cu_seqlens[i], num = args.packed.cu_seqlens[i + 1] - begin;
  const T* values = static_cast<const T*>(args.values) + begin;
  const T* mask = args.mask ? static_cast<const T*>(args.mask) + begin : nullptr;
  const auto part = mask ? reduce<T, greatest, true>(values, mask, num) : reduce<T, greatest, false>(values, mask, num);
  static_cast<T*>(args.result)[i] = static_cast<T>(part.result(args.reduction));
  static_cast<T*>(args.count)[i] = static_cast<T>(part.count);
}

template <typename T>
void reduce(const LeewayReduce& args, int64_t i) {
  args.reduction == LEEWAY_MAX ? reduce<T, true>(args, i) : reduce<T, false>(args, i);
}

template <typename T>
void spread(const LeewaySpread& args, int64_t i) {
  const T value = static_cast<const T*>(args.values)[i];
  const T* mask = static_cast<const T*>(args.mask);
  T* result = static_cast<T*>(args.result);
  for (int64_t t = args.packed.cu_seqlens[i]; t < args.packed.cu_seqlens[i + 1]; ++t) {
    result[t] = mask ? value * mask[t] : value;
  }
}

}  // namespace
}  // namespace leeway

void leeway_token_layout_cpu(const LeewayTokenLayout* args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) leeway::layout(*args, i);
}

void leeway_reduce_cpu(const LeewayReduce* args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args->type == LEEWAY_F64 ? leeway::reduce<double>(*args, i) : leeway::reduce<float>(*args, i);
  }
}

void leeway_spread_cpu(const LeewaySpread* args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args->type == LEEWAY_F64 ? leeway::spread<double>(*args, i) : leeway::spread<float>(*args, i);
  }
}

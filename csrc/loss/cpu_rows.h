// The passes over a row of logits, in the instruction set of the file that includes this.
//
// A row is summed in blocks that stay in the first-level cache: first their greatest logit, then the sums against the
// greatest one so far, so that nothing is rescaled element by element. Lanes add up in float within a block, blocks in
// double. Where the row lies in memory changes no bit of its results.
#pragma once

#include "../common/exp.h"
#include "rows.h"

namespace leeway::LEEWAY_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements

// Within exp's range. Finite, so that an exponential of 0 times it is 0 too; NaN stays NaN.
LEEWAY_INLINE F at_least_lowest(F x) { return greater(splat(kExpLowest), x); }

// A vector at the end of a block: where incomplete, filled up with what weighs nothing.
template <typename X>
LEEWAY_INLINE F load_part(const X* from, int64_t count) {
  if (count >= kLanes) return load(from);
  X filled[kLanes];
  for (X& x : filled) from_float(-INFINITY, x);
  memcpy(filled, from, count * sizeof(X));
  return load(filled);
}

struct Block {
  float greatest;  // logit; any where one is NaN
  float sum, moment;
};

template <typename X>
LEEWAY_INLINE Block block(const X* z, int64_t count, float per_temperature, float top) {
  struct Lanes {
    F greatest, sum, moment;
  };
  Lanes even{splat(-INFINITY), {}, {}}, odd = even;
  const auto add = [&](F x, Lanes& into) __attribute__((always_inline)) {
    const F d = at_least_lowest(x * per_temperature - top);
    const F e = exp(d);
    into.greatest = greater(x, into.greatest);
    into.sum += e;
    into.moment += e * d;
  };
  int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    add(load(z + j), even);
    add(load(z + j + kLanes), odd);
  }
  for (; j < count; j += kLanes) add(load_part(z + j, count - j), even);
  return {greatest(greater(even.greatest, odd.greatest)), sum(even.sum + odd.sum), sum(even.moment + odd.moment)};
}

template <typename X>
RowSums sums(const void* logits, int64_t vocab, float per_temperature) {
  const X* z = static_cast<const X*>(logits);
  RowSums sums{-__FLT_MAX__, 0, 0};  // finite, for blocks of nothing but -inf
  for (int64_t j = 0; j < vocab; j += kBlock) {
    const int64_t count = vocab - j < kBlock ? vocab - j : kBlock;
    Block block = LEEWAY_ISA::block(z + j, count, per_temperature, float(sums.top));
    const double top = block.greatest * per_temperature;
    if (top > sums.top) {
      const double lower = sums.top - top;
      const double scale = ::exp(lower);
      sums = {top, scale * sums.sum, scale * (sums.moment + lower * sums.sum)};
      block = LEEWAY_ISA::block(z + j, count, per_temperature, float(top));
    }
    sums.sum += block.sum;
    sums.moment += block.moment;
  }
  return sums;
}

template <typename X, typename Put>
LEEWAY_INLINE void block_slopes(const X* z, int64_t count, float per_temperature, RowSlope slope, Put put) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const F log_p = at_least_lowest(load_part(z + j, count - j) * per_temperature - slope.lse);
    put(j, exp(log_p) * (log_p * slope.by_log + slope.at_one));
  }
}

template <typename G>
LEEWAY_INLINE void put(G* to, F x, int64_t count, bool past_cache) {
  if (count < kLanes) {
    G filled[kLanes];
    store(filled, x);
    memcpy(to, filled, count * sizeof(G));
  } else if (past_cache) {
    stream(to, x);
  } else {
    store(to, x);
  }
}

// The first block is cut so that the others begin at a line of the cache.
template <typename X, typename G>
void slopes(const void* logits, void* into, int64_t vocab, float per_temperature, RowSlope slope) {
  const X* z = static_cast<const X*>(logits);
  G* grad = static_cast<G*>(into);
  const int64_t beyond_line = reinterpret_cast<uintptr_t>(grad) % 64 / sizeof(G);
  int64_t count = kBlock - beyond_line;
  for (int64_t j = 0; j < vocab; j += count, count = kBlock) {
    if (count > vocab - j) count = vocab - j;
    const bool past_cache = slope.stream && (j > 0 || beyond_line == 0);
    const auto finish = [&](int64_t k, F g) __attribute__((always_inline)) {
      put(grad + j + k, g, count - k, past_cache);
    };
    if constexpr (__is_same(G, Bf16)) {  // rounding takes many steps: behind the exponential, they would hold up more
      F block[kBlock / kLanes];
      const auto keep = [&](int64_t k, F g) __attribute__((always_inline)) { block[k / kLanes] = g; };
      block_slopes(z + j, count, per_temperature, slope, keep);
      for (int64_t k = 0; k < count; k += kLanes) finish(k, block[k / kLanes]);
    } else {
      block_slopes(z + j, count, per_temperature, slope, finish);
    }
  }
}

}  // namespace

const RowKernels kRows = {
    {sums<float>, sums<Bf16>, sums<F16>},
    {{slopes<float, float>, slopes<float, Bf16>, slopes<float, F16>},
     {slopes<Bf16, float>, slopes<Bf16, Bf16>, slopes<Bf16, F16>},
     {slopes<F16, float>, slopes<F16, Bf16>, slopes<F16, F16>}},
    fence,
};

}  // namespace leeway::LEEWAY_ISA

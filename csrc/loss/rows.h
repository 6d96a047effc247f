// What a row of V logits z costs: two passes with one exponential each, compiled for every instruction set.
#pragma once

#include <stdint.h>

namespace leeway {

struct RowSums {   // with d = z / temperature - top
  double top;      // the greatest z / temperature, or near it
  double sum;      // of exp(d)
  double moment;   // of exp(d) d
};

struct RowSlope {  // grad = p (at_one + by_log log p), log p = z / temperature - lse
  float lse, at_one, by_log;
  bool stream;     // past the cache
};

struct RowKernels {  // for float, bf16 and fp16: LeewayType less LEEWAY_F32
  RowSums (*sums[3])(const void* logits, int64_t vocab, float per_temperature);
  void (*slopes[3][3])(const void* logits, void* grad, int64_t vocab, float per_temperature, RowSlope slope);
  void (*fence)();   // makes what was streamed visible to other threads
};

namespace portable {
extern const RowKernels kRows;
}
namespace avx2 {
extern const RowKernels kRows;
}
namespace avx512 {
extern const RowKernels kRows;
}

}  // namespace leeway

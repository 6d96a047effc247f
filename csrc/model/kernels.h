// The kernels of each instruction set, by type: [0] of double, [1] of float.
#pragma once

#include "../api/model.h"

namespace leeway {

struct ModelKernels {
  void (*norm[2])(const LeewayNorm&, int64_t begin, int64_t end);
  void (*norm_grad[2])(const LeewayNorm&, const LeewayNormGrad&, int64_t begin, int64_t end);
  void (*swiglu[2])(const LeewaySwiglu&, int64_t begin, int64_t end);
  void (*swiglu_grad[2])(const LeewaySwiglu&, const LeewaySwigluGrad&, int64_t begin, int64_t end);
  void (*attention[2])(const LeewayAttention&, int64_t begin, int64_t end);
  void (*attention_grad[2])(const LeewayAttention&, const LeewayAttentionGrad&, int64_t begin, int64_t end);
  void (*decode[2])(const LeewayDecode&, int64_t begin, int64_t end);
};

namespace portable {
extern const ModelKernels kModel;
}
namespace avx2 {
extern const ModelKernels kModel;
}
namespace avx512 {
extern const ModelKernels kModel;
}

}  // namespace leeway

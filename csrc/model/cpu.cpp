// The parts of a transformer's layer, in the processor's best instruction set.
#include "../common/dispatch.h"
#include "kernels.h"

namespace leeway {
namespace {

const ModelKernels& kernels() {
  switch (isa()) {
#ifdef __x86_64__
    case Isa::avx512: return avx512::kModel;
    case Isa::avx2: return avx2::kModel;
#endif
    default: return portable::kModel;
  }
}

}  // namespace
}  // namespace leeway

using leeway::kernels;

void leeway_norm_cpu(const LeewayNorm* norm, int64_t begin, int64_t end) {
  kernels().norm[norm->type](*norm, begin, end);
}

void leeway_norm_grad_cpu(const LeewayNorm* norm, const LeewayNormGrad* grad, int64_t begin, int64_t end) {
  kernels().norm_grad[norm->type](*norm, *grad, begin, end);
}

void leeway_swiglu_cpu(const LeewaySwiglu* swiglu, int64_t begin, int64_t end) {
  kernels().swiglu[swiglu->type](*swiglu, begin, end);
}

void leeway_swiglu_grad_cpu(const LeewaySwiglu* swiglu, const LeewaySwigluGrad* grad, int64_t begin, int64_t end) {
  kernels().swiglu_grad[swiglu->type](*swiglu, *grad, begin, end);
}

void leeway_attention_cpu(const LeewayAttention* attention, int64_t begin, int64_t end) {
  kernels().attention[attention->type](*attention, begin, end);
}

void leeway_attention_grad_cpu(const LeewayAttention* attention, const LeewayAttentionGrad* grad, int64_t begin,
                               int64_t end) {
  kernels().attention_grad[attention->type](*attention, *grad, begin, end);
}

void leeway_decode_cpu(const LeewayDecode* decode, int64_t begin, int64_t end) {
  kernels().decode[decode->type](*decode, begin, end);
}

// The three matrix products of a language model's head: of hidden states X [n, H], the weight W [V, H] and the gradient
// dZ [n, V] of the logits Z = X Wᵀ.
//
// X and dZ are of type `factor_type(W)`, Z and the weight's gradient of type `wide(W's)`: products of bfloat16 or
// float16 are summed in float32 and not rounded on the way. On the CPU the split into threads depends on the shapes
// alone, and so do the bits.
#pragma once

#include <ATen/core/Tensor.h>

namespace leeway::bind {

using at::Tensor;

// What X and dZ are to be: on the CPU, which multiplies only float32 fast, never narrower than that.
at::ScalarType factor_type(const Tensor& weight);

// logits = X Wᵀ.
void logits_product(const Tensor& hidden, const Tensor& weight, Tensor logits);
// dZ W, [n, H].
Tensor hidden_product(const Tensor& grad, const Tensor& weight);
// sum = dZᵀ X where `first`, else sum += dZᵀ X.
void weight_product(const Tensor& grad, const Tensor& hidden, Tensor sum, bool first);

}  // namespace leeway::bind

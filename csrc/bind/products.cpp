#include "products.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "loss.h"

namespace leeway::bind {

namespace {

// Elements of a panel of the weight: 4 MB in float32, so that a thread's converted panel stays in its cache.
constexpr int64_t PANEL = 1 << 20;
// Columns of the hidden states' gradient that one thread makes.
constexpr int64_t COLUMNS = 128;

// Calls work(begin, length) for panels of [0, size), on all threads. There are two panels at least: in a lone one the
// BLAS would use threads of its own and sum in an order that depends on their number.
template <typename Work>
void for_panels(int64_t size, int64_t panel, const Work& work) {
  panel = std::clamp<int64_t>(panel, 1, std::max<int64_t>(1, (size + 1) / 2));
  at::parallel_for(0, (size + panel - 1) / panel, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // the threads of the pool do not inherit it
    for (int64_t p = begin; p < end; ++p) work(p * panel, std::min(panel, size - p * panel));
  });
}

int64_t panel_rows(const Tensor& weight) { return std::max<int64_t>(1, PANEL / std::max<int64_t>(1, weight.size(1))); }

}  // namespace

at::ScalarType factor_type(const Tensor& weight) {
  return weight.is_cpu() ? wide(weight.scalar_type()) : weight.scalar_type();
}

void logits_product(const Tensor& hidden, const Tensor& weight, Tensor logits) {
  if (!hidden.is_cpu()) {
    if (hidden.scalar_type() == logits.scalar_type()) {
      at::mm_out(logits, hidden, weight.t());
    } else {
      at::mm_out(logits, hidden, weight.t(), logits.scalar_type());
    }
    return;
  }
  for_panels(weight.size(0), panel_rows(weight), [&](int64_t begin, int64_t length) {
    Tensor out = logits.narrow(1, begin, length);
    at::mm_out(out, hidden, weight.narrow(0, begin, length).to(hidden.scalar_type()).t());
  });
}

Tensor hidden_product(const Tensor& grad, const Tensor& weight) {
  if (!grad.is_cpu()) return at::mm(grad, weight);
  const Tensor result = at::empty({grad.size(0), weight.size(1)}, grad.options());
  const bool as_is = weight.scalar_type() == grad.scalar_type();
  for_panels(weight.size(1), COLUMNS, [&](int64_t column, int64_t width) {
    Tensor out = result.narrow(1, column, width);
    const Tensor columns = weight.narrow(1, column, width);
    const int64_t panel = as_is ? weight.size(0) : PANEL / width;
    for (int64_t begin = 0; begin < weight.size(0); begin += panel) {
      const int64_t length = std::min(panel, weight.size(0) - begin);
      const Tensor rows = columns.narrow(0, begin, length).to(grad.scalar_type());
      at::addmm_out(out, out, grad.narrow(1, begin, length), rows, begin == 0 ? 0 : 1);
    }
  });
  return result;
}

void weight_product(const Tensor& grad, const Tensor& hidden, Tensor sum, bool first) {
  if (!grad.is_cpu()) {
    const Tensor left = grad.t();
    if (grad.scalar_type() == sum.scalar_type()) {
      at::addmm_out(sum, sum, left, hidden, first ? 0 : 1);
    } else if (first) {
      at::mm_out(sum, left, hidden, sum.scalar_type());
    } else {
      at::addmm_out(sum, sum, left, hidden, sum.scalar_type());
    }
    return;
  }
  for_panels(sum.size(0), panel_rows(sum), [&](int64_t begin, int64_t length) {
    Tensor out = sum.narrow(0, begin, length);
    at::addmm_out(out, out, grad.narrow(1, begin, length).t(), hidden, first ? 0 : 1);
  });
}

}  // namespace leeway::bind

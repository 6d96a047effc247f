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

// Elements of a panel of a weight that is converted first: 4 MB in float32.
constexpr int64_t PANEL = 1 << 20;
// Rows of the weight that a thread takes at a time: products with fewer are slower. The hidden states' gradient has a
// sum for each such part.
constexpr int64_t PART = 20000;

// Panels are as many as a multiple of this, of equal size, so that most numbers of threads get as much work each.
constexpr int64_t ROUND = 4;

// [0, size) in panels of at most `most`, two at least: in a lone one the BLAS would use threads of its own and sum in an
// order that depends on their number.
struct Panels {
  int64_t size, panel;

  Panels(int64_t size, int64_t most) : size(size) {
    const int64_t needed = (size + most - 1) / most;
    const int64_t wanted = needed <= 2 ? 2 : (needed + ROUND - 1) / ROUND * ROUND;
    panel = std::max<int64_t>(1, (size + wanted - 1) / wanted);
  }
  int64_t count() const { return (size + panel - 1) / panel; }

  // Calls work(panel's number, begin, length) for each, on all threads.
  template <typename Work>
  void for_each(const Work& work) const {
    at::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      const at::AutoDispatchBelowADInplaceOrView below;  // the threads of the pool do not inherit it
      for (int64_t p = first; p < last; ++p) work(p, p * panel, std::min(panel, size - p * panel));
    });
  }
};

// Rows of the weight that one product takes: few enough to stay in the cache between conversion and product.
int64_t rows_at_once(const Tensor& weight, at::ScalarType factor) {
  if (weight.scalar_type() == factor) return PART;
  return std::max<int64_t>(1, PANEL / std::max<int64_t>(1, weight.size(1)));
}

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
  Panels(weight.size(0), rows_at_once(weight, hidden.scalar_type())).for_each([&](int64_t, int64_t begin, int64_t length) {
    Tensor out = logits.narrow(1, begin, length);
    at::mm_out(out, hidden, weight.narrow(0, begin, length).to(hidden.scalar_type()).t());
  });
}

Tensor hidden_product(const Tensor& grad, const Tensor& weight) {
  if (!grad.is_cpu()) return at::mm(grad, weight);
  const Panels parts(weight.size(0), PART);
  const Tensor sums = at::empty({parts.count(), grad.size(0), weight.size(1)}, grad.options());
  const int64_t most = rows_at_once(weight, grad.scalar_type());
  parts.for_each([&](int64_t part, int64_t first, int64_t size) {
    Tensor sum = sums.select(0, part);
    for (int64_t begin = first; begin < first + size; begin += most) {
      const int64_t length = std::min(most, first + size - begin);
      const Tensor rows = weight.narrow(0, begin, length).to(grad.scalar_type());
      at::addmm_out(sum, sum, grad.narrow(1, begin, length), rows, begin == first ? 0 : 1);
    }
  });
  Tensor total = sums.select(0, 0);
  for (int64_t part = 1; part < parts.count(); ++part) total.add_(sums.select(0, part));
  return total;
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
  Panels(sum.size(0), PART).for_each([&](int64_t, int64_t begin, int64_t length) {
    Tensor out = sum.narrow(0, begin, length);
    at::addmm_out(out, out, grad.narrow(1, begin, length).t(), hidden, first ? 0 : 1);
  });
}

}  // namespace leeway::bind

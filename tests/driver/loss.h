// Rows of logits with all that the C interface wants to know of them.
#pragma once

#include <type_traits>

#include "../../csrc/api/loss.h"
#include "../../csrc/common/bf16.h"
#include "driver.h"

// Absent where the program is not linked for CUDA.
extern "C" {
[[gnu::weak]] decltype(leeway_row_stats_cuda) leeway_row_stats_cuda;
[[gnu::weak]] decltype(leeway_row_grad_cuda) leeway_row_grad_cuda;
[[gnu::weak]] decltype(leeway_row_loss_cuda) leeway_row_loss_cuda;
[[gnu::weak]] decltype(leeway_token_terms_cuda) leeway_token_terms_cuda;
}

namespace driver {

using leeway::Bf16;
using leeway::F16;

struct Number {
  LeewayType type;
  double spacing;  // half the distance of two numbers near 1
  double least;    // half of the least number above 0
};
inline Number number(double) { return {LEEWAY_F64, 0x1p-53, 0}; }
inline Number number(float) { return {LEEWAY_F32, 0x1p-24, 0}; }
inline Number number(Bf16) { return {LEEWAY_BF16, 0x1p-8, 0}; }
inline Number number(F16) { return {LEEWAY_F16, 0x1p-11, 0x1p-25}; }

inline double get(double x) { return x; }
template <typename X>
double get(X x) {
  return leeway::to_float(x);
}
inline void put(double x, double& to) { to = x; }
template <typename X>
void put(double x, X& to) {
  leeway::from_float(float(x), to);
}

// Rows with gaps between them, beginning anywhere: N rows of logits X, gradients G. `aligned`: for vectors of 16 bytes.
template <typename X, typename G>
class RowsOf {
 public:
  typedef std::conditional_t<sizeof(X) == 8, double, float> T;

  RowsOf(Random& random, int64_t num_rows, int64_t vocab, bool aligned = false)
      : num_rows(num_rows),
        vocab(vocab),
        temperature(random.below(2) ? 1 : random.uniform(0.3, 2)),
        logits_offset_(place(random.below(9), aligned)),
        grad_offset_(place(random.below(9), aligned)),
        logits_stride_(place(vocab + random.below(9), aligned)),
        grad_stride_(place(vocab + random.below(9), aligned)),
        targets(num_rows),
        logprob(num_rows),
        entropy(num_rows),
        lse(num_rows),
        slope_logprob(num_rows),
        slope_entropy(num_rows),
        grad(grad_offset_ + (num_rows - 1) * grad_stride_ + vocab),
        logits_(logits_offset_ + (num_rows - 1) * logits_stride_ + vocab) {
    const double spread = random.uniform(0.1, 12);
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t j = 0; j < vocab; ++j) set(i, j, random.uniform(-spread, spread));
      targets[i] = random.below(vocab);
      slope_logprob[i] = T(random.uniform(-1, 1));
      slope_entropy[i] = T(random.uniform(-0.1, 0.1));
    }
  }

  LeewayRows view() {
    return {logits_data(), &grad_at(0, 0), num_rows, vocab, logits_stride_, grad_stride_, number(X{}).type,
            number(G{}).type, targets.data(), temperature, logprob.data(), entropy.data(), lse.data(),
            number(T{}).type, slope_logprob.data(), slope_entropy.data()};
  }

  // The gradient in the memory of the logits, row upon row.
  LeewayRows overlaid() {
    LeewayRows view = this->view();
    view.grad = logits_data();
    view.grad_stride = logits_stride_ * sizeof(X) / sizeof(G);
    return view;
  }
  bool overlay_is(const Array<G>& expected) {
    for (int64_t i = 0; i < num_rows; ++i) {
      const G* row = reinterpret_cast<const G*>(&at(i, 0));
      if (memcmp(row, &expected[&grad_at(i, 0) - grad.data()], vocab * sizeof(G)) != 0) return false;
    }
    return true;
  }

  X* logits_data() { return &at(0, 0); }
  X& at(int64_t i, int64_t j) { return logits_[logits_offset_ + i * logits_stride_ + j]; }
  G& grad_at(int64_t i, int64_t j) { return grad[grad_offset_ + i * grad_stride_ + j]; }
  void set(int64_t i, int64_t j, double x) { put(x, at(i, j)); }
  std::vector<double> row(int64_t i) {
    std::vector<double> row;
    for (int64_t j = 0; j < vocab; ++j) row.push_back(get(at(i, j)));
    return row;
  }

  void poison_grad() { grad.poison(); }
  void poison() {
    logprob.poison();
    entropy.poison();
    lse.poison();
    poison_grad();
  }
  bool gaps_are_poisoned() {
    std::vector<unsigned char> bytes(grad.bytes());
    memcpy(bytes.data(), grad.data(), bytes.size());
    for (int64_t i = 0; i < num_rows; ++i) {
      memset(bytes.data() + (grad_offset_ + i * grad_stride_) * sizeof(G), 0xff, vocab * sizeof(G));
    }
    for (unsigned char byte : bytes) {
      if (byte != 0xff) return false;
    }
    return true;
  }

  const int64_t num_rows, vocab;
  const double temperature;

 private:
  static int64_t place(int64_t at, bool aligned) { return aligned ? (at + 7) / 8 * 8 : at; }
  const int64_t logits_offset_, grad_offset_, logits_stride_, grad_stride_;

 public:
  Array<int64_t> targets;
  Array<T> logprob, entropy, lse, slope_logprob, slope_entropy;
  Array<G> grad;

 private:
  Array<X> logits_;
};

inline void stats(Device device, const LeewayRows& rows) {
  if (device == Device::cpu) return leeway_row_stats_cpu(&rows, 0, rows.num_rows);
  finish(leeway_row_stats_cuda(&rows, nullptr));
}

inline void grads(Device device, const LeewayRows& rows) {
  if (device == Device::cpu) return leeway_row_grad_cpu(&rows, 0, rows.num_rows);
  finish(leeway_row_grad_cuda(&rows, nullptr));
}

}  // namespace driver

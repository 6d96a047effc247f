// Rows of logits against a plain loop in double.
#include <algorithm>
#include <cmath>

#include "loss.h"

namespace driver {
namespace {

struct Expected {
  double logprob, entropy, lse;
  std::vector<double> grad;
};

// c and h are the slopes by logprob and entropy; a logit of -inf has no probability.
Expected expected(const std::vector<double>& z, int64_t target, double temperature, double c, double h) {
  double top = -INFINITY, sum = 0, moment = 0;
  for (double x : z) top = std::isnan(x) || x == INFINITY ? NAN : std::max(top, x / temperature);
  if (top == -INFINITY) top = NAN;
  for (double x : z) sum += std::exp(x / temperature - top);
  Expected row;
  row.lse = top + std::log(sum);
  for (double x : z) {
    const double log_p = x / temperature - row.lse;
    if (log_p != -INFINITY) moment += std::exp(log_p) * log_p;
  }
  row.entropy = -moment;
  row.logprob = z[target] / temperature - row.lse;
  for (size_t j = 0; j < z.size(); ++j) {
    const double log_p = z[j] / temperature - row.lse, p = std::exp(log_p);
    const double of_entropy = log_p == -INFINITY ? 0 : -p * (log_p + row.entropy);
    row.grad.push_back((c * (int64_t(j) == target) - c * p + h * of_entropy) / temperature);
  }
  return row;
}

bool near(double value, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(value);
  return value == expected || std::fabs(value - expected) <= tolerance;
}

template <typename X, typename G>
void compare(RowsOf<X, G>& rows, Device device) {
  typedef typename RowsOf<X, G>::T T;
  const double eps = sizeof(T) == 8 ? 1e-14 : 1.2e-7;
  stats(device, rows.view());
  grads(device, rows.view());
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const std::vector<double> z = rows.row(i);
    const double c = rows.slope_logprob[i], h = rows.slope_entropy[i];
    const Expected row = expected(z, rows.targets[i], rows.temperature, c, h);
    double farthest = 1;  // from the top: what the error of 1 / temperature is multiplied by
    for (double x : z) {
      if (std::isfinite(x)) farthest = std::max(farthest, std::fabs(x / rows.temperature) + std::fabs(row.lse));
    }
    const double tolerance = 4 * eps * farthest;
    const auto where = [&](const char* what, double value, double expected) {
      fprintf(stderr, "device %d, row %ld of %ld, vocab %ld: %s %.9g, not %.9g\n", int(device), long(i),
              long(rows.num_rows), long(rows.vocab), what, value, expected);
      return false;
    };
    const auto check = [&](const char* what, double value, double expected, double tolerance) {
      REQUIRE(near(value, expected, tolerance) || where(what, value, expected), "tolerance %g", tolerance);
    };
    check("logprob", rows.logprob[i], row.logprob, tolerance);
    check("lse", rows.lse[i], row.lse, tolerance);
    check("entropy", rows.entropy[i], row.entropy, tolerance);
    for (int64_t j = 0; j < rows.vocab; ++j) {
      const double p = std::exp(z[j] / rows.temperature - row.lse);
      const double terms = std::fabs(c) + std::fabs(h) * (farthest + row.entropy);
      const double slack = tolerance * terms * (p + (j == rows.targets[i])) / rows.temperature;
      const double rounding = number(G{}).spacing * std::fabs(row.grad[j]) + number(G{}).least;
      check("grad", get(rows.grad_at(i, j)), row.grad[j], slack + rounding + 1e-37);
    }
  }
  REQUIRE(rows.gaps_are_poisoned(), "written between the rows");
}

template <typename X, typename G>
void compare_all(uint64_t seed) {
  Random random(seed);
  for (int64_t vocab : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1023, 1024, 1025, 2047, 2500, 5003}) {
    for (bool aligned : {false, true}) {
      RowsOf<X, G> rows(random, 1 + random.below(4), vocab, aligned);
      for (Device device : devices()) {
        compare(rows, device);
        rows.poison();
      }
    }
  }
}

}  // namespace

CHECK(rows_of_every_type_and_shape) {
  compare_all<double, double>(1);
  compare_all<float, float>(2);
  compare_all<float, Bf16>(3);
  compare_all<float, F16>(4);
  compare_all<Bf16, float>(5);
  compare_all<Bf16, Bf16>(6);
  compare_all<Bf16, F16>(7);
  compare_all<F16, float>(8);
  compare_all<F16, Bf16>(9);
  compare_all<F16, F16>(10);
}

// Each makes something of a row that is hard to sum; the target may be among what is changed.
template <typename X>
void compare_edges() {
  typedef void (*Edge)(RowsOf<X, X>&, int64_t row);
  const Edge edges[] = {
      [](RowsOf<X, X>& rows, int64_t i) { rows.set(i, rows.vocab / 2, -INFINITY); },
      [](RowsOf<X, X>& rows, int64_t i) { rows.set(i, rows.targets[i], -INFINITY); },
      [](RowsOf<X, X>& rows, int64_t i) { rows.set(i, rows.vocab / 2, INFINITY); },
      [](RowsOf<X, X>& rows, int64_t i) { rows.set(i, rows.vocab - 1, NAN); },
      [](RowsOf<X, X>& rows, int64_t i) { rows.set(i, 0, NAN); },
      [](RowsOf<X, X>& rows, int64_t i) {  // whole blocks without weight, at the beginning and at the end
        for (int64_t j = 0; j < rows.vocab; ++j) {
          if (j < rows.vocab / 2 || j > rows.vocab / 2 + 9) rows.set(i, j, -INFINITY);
        }
      },
      [](RowsOf<X, X>& rows, int64_t i) {
        for (int64_t j = 0; j < rows.vocab; ++j) rows.set(i, j, -INFINITY);
      },
      [](RowsOf<X, X>& rows, int64_t i) {  // all far below 0
        for (int64_t j = 0; j < rows.vocab; ++j) rows.set(i, j, -2000 + get(rows.at(i, j)));
      },
      [](RowsOf<X, X>& rows, int64_t i) {  // the greatest always yet to come
        for (int64_t j = 0; j < rows.vocab; ++j) rows.set(i, j, -300 + 0.1 * double(j));
      },
      [](RowsOf<X, X>& rows, int64_t i) {  // nothing but the target has weight
        for (int64_t j = 0; j < rows.vocab; ++j) rows.set(i, j, -200);
        rows.set(i, rows.targets[i], 200);
      },
      [](RowsOf<X, X>& rows, int64_t i) {  // all alike
        for (int64_t j = 0; j < rows.vocab; ++j) rows.set(i, j, 3);
      },
  };
  Random random(11);
  for (Edge edge : edges) {
    for (int64_t vocab : {1, 19, 64, 3000}) {
      RowsOf<X, X> rows(random, 3, vocab, random.below(2));
      edge(rows, 1);
      for (Device device : devices()) {
        compare(rows, device);
        rows.poison();
      }
    }
  }
}

CHECK(rows_with_infinities_and_nan) {
  compare_edges<double>();
  compare_edges<float>();
  compare_edges<Bf16>();
  compare_edges<F16>();
}

CHECK(a_target_outside_the_vocabulary_is_nan) {
  Random random(12);
  for (Device device : devices()) {
    for (int64_t target : {int64_t(-100), int64_t(-1), int64_t(70), INT64_MAX}) {
      RowsOf<float, float> rows(random, 2, 70);
      rows.targets[0] = target;
      stats(device, rows.view());
      REQUIRE(std::isnan(rows.logprob[0]) && std::isfinite(rows.lse[0]) && std::isfinite(rows.entropy[0]), "%ld",
              long(target));
      REQUIRE(std::isfinite(rows.logprob[1]), "the row beside it");
    }
  }
}

// Any split into ranges, again and again, in place, and past the cache: the same bits.
template <typename X>
void compare_bits() {
  Random random(13);
  for (int64_t vocab : {5, 1024, 3001}) {
    RowsOf<X, X> rows(random, 7, vocab);
    stats(Device::cpu, rows.view());
    grads(Device::cpu, rows.view());
    const auto grad = rows.grad;
    const auto logprob = rows.logprob, entropy = rows.entropy, lse = rows.lse;
    const auto same = [&] {
      return rows.logprob.same_bits(logprob) && rows.entropy.same_bits(entropy) && rows.lse.same_bits(lse) &&
             rows.grad.same_bits(grad);
    };
    rows.poison();
    LeewayRows view = rows.view();
    for (int64_t begin : {4, 0, 3}) {
      const int64_t end = begin == 0 ? 3 : begin == 3 ? 4 : 7;
      leeway_row_stats_cpu(&view, begin, end);
      leeway_row_grad_cpu(&view, begin, end);
    }
    REQUIRE(same(), "ranges, vocab %ld", long(vocab));

    rows.poison();
    stats(Device::cpu, rows.view());
    view = rows.view();
    view.num_rows = int64_t(1) << 40;  // more gradient than any cache holds
    leeway_row_grad_cpu(&view, 0, 7);
    REQUIRE(same(), "past the cache, vocab %ld", long(vocab));

    view = rows.view();
    view.grad = rows.logits_data();
    view.grad_stride = view.logits_stride;
    grads(Device::cpu, view);
    for (int64_t i = 0; i < rows.num_rows; ++i) {
      REQUIRE(memcmp(&rows.at(i, 0), &rows.grad_at(i, 0), vocab * sizeof(X)) == 0, "in place, vocab %ld", long(vocab));
    }
  }
}

CHECK(rows_are_the_same_bits_however_they_are_computed) {
  compare_bits<double>();
  compare_bits<float>();
  compare_bits<Bf16>();
  compare_bits<F16>();
}

CHECK(rows_on_cuda_are_the_same_bits_twice) {
  Random random(14);
  if (devices().back() != Device::cuda) return;
  RowsOf<Bf16, Bf16> rows(random, 5, 3001);
  stats(Device::cuda, rows.view());
  grads(Device::cuda, rows.view());
  const auto grad = rows.grad;
  const auto logprob = rows.logprob, entropy = rows.entropy;
  rows.poison();
  stats(Device::cuda, rows.view());
  grads(Device::cuda, rows.view());
  REQUIRE(rows.grad.same_bits(grad) && rows.logprob.same_bits(logprob) && rows.entropy.same_bits(entropy), "twice");
}

// In their own memory too, where the block of each row has read what it overwrites.
template <typename X, typename G>
void compare_overlay() {
  Random random(18);
  if (devices().back() != Device::cuda) return;
  for (int64_t vocab : {1, 40, 3001, 9000}) {
    for (bool aligned : {false, true}) {
      RowsOf<X, G> rows(random, 3, vocab, aligned);
      stats(Device::cuda, rows.view());
      grads(Device::cuda, rows.view());
      grads(Device::cuda, rows.overlaid());
      REQUIRE(rows.overlay_is(rows.grad), "vocab %ld", long(vocab));
    }
  }
}

CHECK(gradients_on_cuda_overlay_the_logits) {
  compare_overlay<double, double>();
  compare_overlay<float, float>();
  compare_overlay<float, Bf16>();
  compare_overlay<float, F16>();
  compare_overlay<Bf16, Bf16>();
}

CHECK(rows_without_slopes_are_filled_with_zeros_unread) {
  Random random(15);
  for (Device device : devices()) {
    RowsOf<Bf16, float> rows(random, 3, 1500);
    stats(device, rows.view());
    rows.slope_logprob[1] = rows.slope_entropy[1] = 0;
    for (int64_t j = 0; j < rows.vocab; ++j) rows.set(1, j, NAN);
    grads(device, rows.view());
    for (int64_t j = 0; j < rows.vocab; ++j) {
      REQUIRE(rows.grad_at(1, j) == 0, "%ld", long(j));
      REQUIRE(rows.grad_at(2, j) != 0, "%ld", long(j));
    }
  }
}

CHECK(no_slopes_given_are_zeros) {
  Random random(16);
  for (Device device : devices()) {
    RowsOf<float, float> rows(random, 2, 40);
    stats(device, rows.view());
    LeewayRows view = rows.view();
    view.slope_entropy = nullptr;
    grads(device, view);
    const auto grad = rows.grad;
    for (auto& h : rows.slope_entropy) h = 0;
    rows.poison_grad();
    grads(device, rows.view());
    REQUIRE(rows.grad.same_bits(grad), "device %d", int(device));
  }
}

CHECK(no_rows_are_no_error) {
  Random random(19);
  for (Device device : devices()) {
    RowsOf<float, float> rows(random, 1, 40);
    LeewayRows view = rows.view();
    view.num_rows = 0;
    stats(device, view);
    grads(device, view);
    REQUIRE(std::isnan(rows.lse[0]) && std::isnan(rows.grad_at(0, 0)), "written");
  }
}

// Rows so far apart that their places pass 2^31 elements and 2^32 bytes.
CHECK(rows_beyond_2_to_the_31) {
  const int64_t stride = (int64_t(1) << 31) + 3, vocab = 100, num_rows = 3;
  const size_t bytes = size_t(stride * (num_rows - 1) + vocab) * sizeof(Bf16);
  Random random(17);
  RowsOf<Bf16, Bf16> near_rows(random, num_rows, vocab);
  Bf16* logits = static_cast<Bf16*>(reserve(bytes));
  Bf16* grad = static_cast<Bf16*>(reserve(bytes));
  for (int64_t i = 0; i < num_rows; ++i) memcpy(logits + i * stride, &near_rows.at(i, 0), vocab * sizeof(Bf16));
  for (Device device : devices()) {
    stats(device, near_rows.view());
    grads(device, near_rows.view());
    const auto logprob = near_rows.logprob;
    LeewayRows view = near_rows.view();
    view.logits = logits;
    view.grad = grad;
    view.logits_stride = view.grad_stride = stride;
    stats(device, view);
    grads(device, view);
    REQUIRE(near_rows.logprob.same_bits(logprob), "device %d", int(device));
    for (int64_t i = 0; i < num_rows; ++i) {
      REQUIRE(memcmp(grad + i * stride, &near_rows.grad_at(i, 0), vocab * sizeof(Bf16)) == 0, "row %ld", long(i));
    }
  }
  unreserve(logits, bytes);
  unreserve(grad, bytes);
}

}  // namespace driver

// The token loss on the CPU: rows in the processor's best instruction set, tokens in plain C++.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/bf16.h"
#include "../common/dispatch.h"
#include "rows.h"
#include "token_loss.h"

namespace leeway {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kCached = int64_t{8} << 20;  // bytes of gradient that the cache may hold for whoever reads them next

const RowKernels& kernels() {
  switch (isa()) {
#ifdef __x86_64__
    case Isa::avx512: return avx512::kRows;
    case Isa::avx2: return avx2::kRows;
#endif
    default: return portable::kRows;
  }
}

int64_t size_of(LeewayType type) { return type == LEEWAY_F64 ? 8 : type == LEEWAY_F32 ? 4 : 2; }

// In float as the kernels take it, unless all is double.
double per_temperature(const LeewayRows& rows) {
  return rows.logits_type == LEEWAY_F64 ? 1 / rows.temperature : float(1 / rows.temperature);
}

const void* logits(const LeewayRows& rows, int64_t row) {
  return static_cast<const char*>(rows.logits) + row * rows.logits_stride * size_of(rows.logits_type);
}

void* grad(const LeewayRows& rows, int64_t row) {
  return static_cast<char*>(rows.grad) + row * rows.grad_stride * size_of(rows.grad_type);
}

double read(LeewayType type, const void* array, int64_t i) {
  switch (type) {
    case LEEWAY_F64: return static_cast<const double*>(array)[i];
    case LEEWAY_F32: return static_cast<const float*>(array)[i];
    case LEEWAY_BF16: return to_float(static_cast<const Bf16*>(array)[i]);
    default: return to_float(static_cast<const F16*>(array)[i]);
  }
}

void write(LeewayType type, void* array, int64_t i, double x) {
  switch (type) {
    case LEEWAY_F64: static_cast<double*>(array)[i] = x; break;
    case LEEWAY_F32: static_cast<float*>(array)[i] = float(x); break;
    case LEEWAY_BF16: from_float(float(x), static_cast<Bf16*>(array)[i]); break;
    default: from_float(float(x), static_cast<F16*>(array)[i]);
  }
}

// The target's logit / temperature; NaN where there is no such target, and so everything that follows from it.
double of_target(const LeewayRows& rows, int64_t row) {
  const int64_t target = rows.targets[row];
  if (target < 0 || target >= rows.vocab) return kNaN;
  return read(rows.logits_type, logits(rows, row), target) * per_temperature(rows);
}

// ---- In double, for gradient checks

RowSums sums_of(const double* z, int64_t vocab, double per_temperature) {
  RowSums sums{std::numeric_limits<double>::lowest(), 0, 0};
  for (int64_t j = 0; j < vocab; ++j) sums.top = std::max(sums.top, z[j] * per_temperature);
  for (int64_t j = 0; j < vocab; ++j) {
    const double d = z[j] * per_temperature - sums.top;
    const double e = std::exp(d);
    sums.sum += e;
    sums.moment += e == 0 ? 0 : e * d;
  }
  return sums;
}

void slopes_of(const double* z, double* grad, int64_t vocab, double per_temperature, double lse, double at_one,
               double by_log) {
  for (int64_t j = 0; j < vocab; ++j) {
    const double log_p = z[j] * per_temperature - lse;
    const double p = std::exp(log_p);
    grad[j] = p == 0 ? p * at_one : p * (at_one + by_log * log_p);
  }
}

// ---- A row

template <typename T>
struct RowStats {
  T logprob, entropy, lse;
};

template <typename T>
RowStats<T> stats_of(const LeewayRows& rows, int64_t row) {
  const double scale = per_temperature(rows);
  const void* z = logits(rows, row);
  const RowSums sums = rows.logits_type == LEEWAY_F64
                           ? sums_of(static_cast<const double*>(z), rows.vocab, scale)
                           : kernels().sums[rows.logits_type - LEEWAY_F32](z, rows.vocab, float(scale));
  const double log_sum = sums.sum > 0 ? std::log(sums.sum) : kNaN;
  return {T(of_target(rows, row) - sums.top - log_sum), T(log_sum - sums.moment / sums.sum), T(sums.top + log_sum)};
}

template <typename T>
void store(const LeewayRows& rows, int64_t row, const RowStats<T>& stats) {
  static_cast<T*>(rows.logprob)[row] = stats.logprob;
  static_cast<T*>(rows.entropy)[row] = stats.entropy;
  static_cast<T*>(rows.lse)[row] = stats.lse;
}

// grad_j = 1/temperature (c (1[j = target] - p_j) - h p_j (log p_j + H)), c and h the slopes by logprob and entropy.
template <typename T>
void grad_of(const LeewayRows& rows, int64_t row, T lse, T entropy, T c, T h) {
  void* into = grad(rows, row);
  if (c == 0 && h == 0) {
    std::memset(into, 0, rows.vocab * size_of(rows.grad_type));
    return;
  }
  const double scale = per_temperature(rows);
  const void* z = logits(rows, row);
  const double log_p = of_target(rows, row) - lse;
  const double at_one = -scale * (c + double(h) * entropy), by_log = -scale * h;
  if (rows.logits_type == LEEWAY_F64) {
    slopes_of(static_cast<const double*>(z), static_cast<double*>(into), rows.vocab, scale, lse, at_one, by_log);
  } else {
    const bool stream = rows.grad != rows.logits && rows.num_rows * rows.vocab * size_of(rows.grad_type) > kCached;
    const auto slopes = kernels().slopes[rows.logits_type - LEEWAY_F32][rows.grad_type - LEEWAY_F32];
    slopes(z, into, rows.vocab, float(scale), {float(lse), float(at_one), float(by_log), stream});
  }
  if (std::isnan(log_p)) return;
  const double p = std::exp(log_p);
  const double of_entropy = p == 0 ? 0 : p * (log_p + entropy);
  write(rows.grad_type, into, rows.targets[row], -scale * (c * std::expm1(log_p) + h * of_entropy));
}

// ---- Ranges

template <typename T>
void row_stats(const LeewayRows& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) store(rows, row, stats_of<T>(rows, row));
}

template <typename T>
void row_grad(const LeewayRows& rows, int64_t begin, int64_t end) {
  const auto at = [](const void* array, int64_t row) { return array ? static_cast<const T*>(array)[row] : T(0); };
  for (int64_t row = begin; row < end; ++row) {
    grad_of<T>(rows, row, at(rows.lse, row), at(rows.entropy, row), at(rows.slope_logprob, row),
               at(rows.slope_entropy, row));
  }
  kernels().fence();
}

template <typename T>
void row_loss(const LeewayRows& rows, const LeewayTokens& tokens, const LeewayRecipe& given, int64_t begin,
              int64_t end) {
  const Recipe<T> recipe = leeway::recipe<T>(given);
  for (int64_t row = begin; row < end; ++row) {
    RowStats<T> stats{};
    Terms<T> terms;
    if (static_cast<const T*>(tokens.mask)[row] != 0) {
      stats = stats_of<T>(rows, row);
      terms = leeway::terms(recipe, token(tokens, row, stats.logprob, stats.entropy), SequenceStats<T>{});
    }
    store(rows, row, stats);
    grad_of<T>(rows, row, stats.lse, stats.entropy, terms.coefficient, terms.slope_entropy);
  }
  kernels().fence();
}

template <typename T>
void token_terms(const LeewayTokens& tokens, const LeewayRecipe& given, const T* logprob, const T* entropy,
                 const LeewayTerms& out, int64_t sequence) {
  const Recipe<T> recipe = leeway::recipe<T>(given);
  const int64_t begin = tokens.cu_seqlens[sequence], end = tokens.cu_seqlens[sequence + 1];
  const auto at = [&](int64_t i) { return token(tokens, i, logprob[i], entropy ? entropy[i] : T(0)); };

  SequenceStats<T> stats;
  if (is_sequence_level(given)) {
    SequenceSums sums;
    for (int64_t i = begin; i < end; ++i) add(sums, at(i));
    stats = sequence_stats(recipe, sums);
    double pulls = 0;
    for (int64_t i = begin; i < end; ++i) pulls += pull(recipe, at(i), stats);
    stats.pull = T(pulls);
  }
  double sums[LEEWAY_HEALTH] = {};
  double* row = out.health ? out.health + sequence * (LEEWAY_HEALTH + given.num_bins) : nullptr;
  if (row) std::fill_n(row, LEEWAY_HEALTH + given.num_bins, 0.0);
  for (int64_t i = begin; i < end; ++i) {
    const Token<T> token = at(i);
    const Terms<T> terms = leeway::terms(recipe, token, stats);
    store(out, i, terms);
    if (!row || token.masked) continue;
    health(token, terms, is_own(tokens, i), sums);
    if (tokens.staleness && given.num_bins > 0) row[LEEWAY_HEALTH + bin(tokens.staleness[i], given.num_bins)] += 1;
  }
  if (row) std::copy_n(sums, LEEWAY_HEALTH, row);
}

}  // namespace
}  // namespace leeway

void leeway_row_stats_cpu(const LeewayRows* rows, int64_t begin, int64_t end) {
  const auto run = rows->type == LEEWAY_F64 ? leeway::row_stats<double> : leeway::row_stats<float>;
  run(*rows, begin, end);
}

void leeway_row_grad_cpu(const LeewayRows* rows, int64_t begin, int64_t end) {
  const auto run = rows->type == LEEWAY_F64 ? leeway::row_grad<double> : leeway::row_grad<float>;
  run(*rows, begin, end);
}

void leeway_row_loss_cpu(const LeewayRows* rows, const LeewayTokens* tokens, const LeewayRecipe* recipe, int64_t begin,
                         int64_t end) {
  const auto run = rows->type == LEEWAY_F64 ? leeway::row_loss<double> : leeway::row_loss<float>;
  run(*rows, *tokens, *recipe, begin, end);
}

void leeway_token_terms_cpu(const LeewayTokens* tokens, const LeewayRecipe* recipe, const void* logprob,
                            const void* entropy, const LeewayTerms* out, int64_t begin, int64_t end) {
  const auto run = [&](auto type) {
    typedef decltype(type) T;
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      leeway::token_terms(*tokens, *recipe, static_cast<const T*>(logprob), static_cast<const T*>(entropy), *out,
                          sequence);
    }
  };
  tokens->type == LEEWAY_F64 ? run(double{}) : run(float{});
}

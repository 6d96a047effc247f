// The operators of the token loss on logits.
#include "loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../loss/token_loss.h"
#include "device.h"
#include "memory.h"

namespace leeway::bind {

namespace {

// Elements of logits below which a thread of its own does not pay.
constexpr int64_t GRAIN = 1 << 15;

int64_t grain(int64_t row) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, row)); }

void* data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
void* data(const MaybeTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }
const void* const_data(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* const_data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

MaybeTensor select(const MaybeTensor& tensor, const Tensor& rows) {
  return tensor ? MaybeTensor(tensor->index_select(0, rows)) : std::nullopt;
}

MaybeTensor narrow(const MaybeTensor& tensor, int64_t begin, int64_t length) {
  return tensor ? MaybeTensor(tensor->narrow(0, begin, length)) : std::nullopt;
}

}  // namespace

// ---- Kernels on tensors

Tokens Tokens::select(const Tensor& rows, const Tensor& cu_seqlens) const {
  const auto of = [&](const auto& tensor) { return bind::select(tensor, rows); };
  return {cu_seqlens,   *of(behaviour), *of(advantage), *of(mask),     *of(omega),
          of(proximal), of(reference),  of(staleness),  moved};
}

Tokens Tokens::narrow(int64_t begin, int64_t length, const Tensor& cu_seqlens) const {
  const auto of = [&](const auto& tensor) { return bind::narrow(tensor, begin, length); };
  return {cu_seqlens,   *of(behaviour), *of(advantage), *of(mask),     *of(omega),
          of(proximal), of(reference),  of(staleness),  moved};
}

LeewayTokens Tokens::view() const {
  return {num_tokens(),
          num_sequences(),
          cu_seqlens.const_data_ptr<int32_t>(),
          const_data(behaviour),
          const_data(proximal),
          const_data(reference),
          const_data(advantage),
          const_data(mask),
          const_data(omega),
          staleness ? staleness->const_data_ptr<int32_t>() : nullptr,
          moved,
          type_of(behaviour.scalar_type())};
}

Stats Stats::empty(int64_t n, const at::TensorOptions& options) {
  return {at::empty({n}, options), at::empty({n}, options), at::empty({n}, options)};
}

Stats Stats::narrow(int64_t begin, int64_t length) const {
  return {logprob.narrow(0, begin, length), entropy.narrow(0, begin, length), lse.narrow(0, begin, length)};
}

LeewayRows Rows::view(const Stats& stats) const {
  LeewayRows rows{};
  rows.logits = logits.const_data_ptr();
  rows.num_rows = logits.size(0);
  rows.vocab = logits.size(1);
  rows.logits_stride = logits.stride(0);
  rows.logits_type = type_of(logits.scalar_type());
  rows.targets = targets.const_data_ptr<int64_t>();
  rows.temperature = temperature;
  rows.logprob = data(stats.logprob);
  rows.entropy = data(stats.entropy);
  rows.lse = data(stats.lse);
  rows.type = type_of(stats.logprob.scalar_type());
  return rows;
}

namespace {

void set_grad(LeewayRows& rows, const Tensor& grad) {
  rows.grad = data(grad);
  rows.grad_stride = grad.stride(0);
  rows.grad_type = type_of(grad.scalar_type());
}

}  // namespace

void row_stats(const Rows& rows, const Stats& out) {
  const LeewayRows view = rows.view(out);
  if (!rows.logits.is_cpu()) return LEEWAY_LAUNCH(leeway_row_stats_cuda, rows.logits.device(), &view);
  at::parallel_for(0, view.num_rows, grain(view.vocab),
                   [&](int64_t begin, int64_t end) { leeway_row_stats_cpu(&view, begin, end); });
}

void row_grad(const Rows& rows, const Stats& stats, const Slopes& slopes, const Tensor& grad) {
  LeewayRows view = rows.view(stats);
  set_grad(view, grad);
  view.slope_logprob = const_data(slopes.logprob);
  view.slope_entropy = const_data(slopes.entropy);
  if (!rows.logits.is_cpu()) return LEEWAY_LAUNCH(leeway_row_grad_cuda, rows.logits.device(), &view);
  at::parallel_for(0, view.num_rows, grain(view.vocab),
                   [&](int64_t begin, int64_t end) { leeway_row_grad_cpu(&view, begin, end); });
}

void row_loss(const Rows& rows, const Tokens& tokens, const LeewayRecipe& recipe, const Stats& out,
              const Tensor& grad) {
  LeewayRows view = rows.view(out);
  set_grad(view, grad);
  const LeewayTokens known = tokens.view();
  if (!rows.logits.is_cpu()) {
    return LEEWAY_LAUNCH(leeway_row_loss_cuda, rows.logits.device(), &view, &known, &recipe);
  }
  at::parallel_for(0, view.num_rows, grain(view.vocab), [&](int64_t begin, int64_t end) {
    leeway_row_loss_cpu(&view, &known, &recipe, begin, end);
  });
}

void token_terms(const Tokens& tokens, const LeewayRecipe& recipe, const Stats& stats, const Terms& out) {
  const LeewayTokens known = tokens.view();
  const void* logprob = const_data(stats.logprob);
  const void* entropy = const_data(stats.entropy);
  const LeewayTerms terms{nullptr, data(out.ratio), data(out.coefficient), data(out.slope_entropy),
                          static_cast<double*>(data(out.health))};
  if (!stats.logprob.is_cpu()) {
    const at::Device device = stats.logprob.device();
    return LEEWAY_LAUNCH(leeway_token_terms_cuda, device, &known, &recipe, logprob, entropy, &terms);
  }
  const int64_t mean = known.num_tokens / std::max<int64_t>(1, known.num_sequences);
  at::parallel_for(0, known.num_sequences, grain(mean), [&](int64_t begin, int64_t end) {
    leeway_token_terms_cpu(&known, &recipe, logprob, entropy, &terms, begin, end);
  });
}

Tensor total(const Tensor& health) {
  if (!health.is_cpu()) return health.sum(0);
  const int64_t size = health.size(1);
  const Tensor sums = at::zeros({size}, health.options());
  const double* of_sequence = health.const_data_ptr<double>();
  double* sum = sums.mutable_data_ptr<double>();
  for (int64_t s = 0; s < health.size(0); ++s, of_sequence += size) {  // in an order that no thread changes
    for (int64_t i = 0; i < size; ++i) sum[i] += of_sequence[i];
  }
  return sums;
}

Tensor loss_of(const Tensor& health, at::ScalarType type) { return health.select(0, 1).to(type, false, true); }

// ---- Operators

namespace {

using at::Tensor;

// Logits as the kernels read them: any distance between rows, but elements of a row side by side.
Tensor readable(const Tensor& logits) {
  check_matrix(logits, "logits");
  return logits.stride(1) == 1 || logits.size(1) == 1 ? logits : logits.contiguous();
}

at::TensorOptions wide_options(const Tensor& tensor) { return tensor.options().dtype(wide(tensor.scalar_type())); }

std::tuple<Tensor, Tensor, Tensor> row_stats_op(const Tensor& given, const Tensor& targets, double temperature) {
  const Tensor logits = readable(given);
  const int64_t n = logits.size(0);
  check_temperature(temperature);
  const Rows rows{logits, bind::targets(targets, {n, logits.device()}, logits.size(1)), temperature};
  const Stats stats = Stats::empty(n, wide_options(logits));
  row_stats(rows, stats);
  return {stats.logprob, stats.entropy, stats.lse};
}

Tensor row_grad_op(const Tensor& given, const Tensor& targets, const Tensor& lse, const Tensor& entropy,
                   const Tensor& grad_logprob, const MaybeTensor& grad_entropy, double temperature) {
  const Tensor logits = readable(given);
  const Expected expected{logits.size(0), logits.device()};
  const at::ScalarType type = wide(logits.scalar_type());
  check_temperature(temperature);
  const Rows rows{logits, bind::targets(targets, expected, logits.size(1)), temperature};
  const Stats stats{at::empty({expected.size}, wide_options(logits)), vector(entropy, "entropy", expected, type),
                    vector(lse, "lse", expected, type)};
  const Slopes slopes{vector(grad_logprob, "grad_logprob", expected, type),
                      vector(grad_entropy, "grad_entropy", expected, type)};
  const Tensor grad = fresh(logits.sizes(), logits.options());
  row_grad(rows, stats, slopes, grad);
  return grad;
}

struct Loss {
  Tensor loss, ratio, coefficient, health;
};

// Writes `stats` and, where it is there, `grad`.
Loss token_loss(const Rows& rows, const Tokens& tokens, const LeewayRecipe& recipe, const Stats& stats,
                const MaybeTensor& grad) {
  const auto options = stats.logprob.options();
  const auto vector = [&] { return at::empty({tokens.num_tokens()}, options); };
  const Terms terms{vector(), vector(), vector(),
                    at::empty({tokens.num_sequences(), LEEWAY_HEALTH + recipe.num_bins}, options.dtype(at::kDouble))};
  const bool at_once = grad && !is_sequence_level(recipe);
  if (at_once) {
    row_loss(rows, tokens, recipe, stats, *grad);
  } else {
    row_stats(rows, stats);
    const Tensor masked = tokens.mask.eq(0);
    for (const Tensor& values : {stats.logprob, stats.entropy}) values.masked_fill_(masked, 0);
  }
  token_terms(tokens, recipe, stats, terms);
  if (grad && !at_once) row_grad(rows, stats, {*terms.coefficient, terms.slope_entropy}, *grad);
  const Tensor health = total(*terms.health);
  return {loss_of(health, stats.logprob.scalar_type()), *terms.ratio, *terms.coefficient, health};
}

#define LEEWAY_PARAMETERS LEEWAY_TOKENS_PARAMETERS, LEEWAY_RECIPE_PARAMETERS, double temperature

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_loss_op(const Tensor& given,
                                                                                 const Tensor& targets,
                                                                                 LEEWAY_PARAMETERS, bool wants_grad, bool) {
  const Tensor logits = readable(given);
  const Expected expected{logits.size(0), logits.device()};
  const at::ScalarType type = wide(logits.scalar_type());
  check_temperature(temperature);
  const Tokens known = LEEWAY_TOKENS;
  const LeewayRecipe recipe = LEEWAY_RECIPE;
  check_recipe(recipe, known);
  const Rows rows{logits, bind::targets(targets, expected, logits.size(1)), temperature};
  const Stats stats = Stats::empty(expected.size, wide_options(logits));
  const Tensor grad = fresh(wants_grad ? logits.sizes() : at::IntArrayRef{0}, logits.options());
  const Loss out = token_loss(rows, known, recipe, stats, wants_grad ? MaybeTensor(grad) : std::nullopt);
  return {out.loss, stats.logprob, stats.entropy, out.ratio, out.coefficient, out.health, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_loss_op_(Tensor& logits, const Tensor& targets,
                                                                          LEEWAY_PARAMETERS) {
  check_matrix(logits, "logits");
  TORCH_CHECK_VALUE(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1), "logits: rows overlap");
  TORCH_CHECK_VALUE(logits.size(1) == 1 || logits.stride(1) == 1, "logits: rows are not contiguous");
  const Expected expected{logits.size(0), logits.device()};
  const at::ScalarType type = wide(logits.scalar_type());
  check_temperature(temperature);
  const Tokens known = LEEWAY_TOKENS;
  const LeewayRecipe recipe = LEEWAY_RECIPE;
  check_recipe(recipe, known);
  const Rows rows{logits, bind::targets(targets, expected, logits.size(1)), temperature};
  const Stats stats = Stats::empty(expected.size, wide_options(logits));
  const Loss out = token_loss(rows, known, recipe, stats, logits);
  return {out.loss, stats.logprob, stats.entropy, out.ratio, out.coefficient, out.health};
}

void implement(torch::Library& m) {
  m.impl("row_stats", row_stats_op);
  m.impl("row_grad", row_grad_op);
  m.impl("token_loss", token_loss_op);
  m.impl("token_loss_", token_loss_op_);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(leeway, m) {
  m.def("health_names() -> str[]", []() -> std::vector<std::string> { return {LEEWAY_HEALTH_NAMES}; });
  m.def("slot_names(str slot) -> str[]", slot_names);
  m.def("row_stats(Tensor logits, Tensor targets, float temperature) -> (Tensor logprob, Tensor entropy, Tensor lse)");
  m.def(
      "row_grad(Tensor logits, Tensor targets, Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor? grad_entropy, "
      "float temperature) -> Tensor");
  // With `reuse`, backward overwrites the gradient that it has returned.
  m.def("token_loss(Tensor logits, Tensor targets, " LEEWAY_TOKENS_SCHEMA LEEWAY_RECIPE_SCHEMA
        "float temperature, bool wants_grad, bool reuse) -> (Tensor loss, Tensor logprob, Tensor entropy, Tensor ratio, "
        "Tensor coefficient, Tensor health, Tensor grad)");
  m.def("token_loss_(Tensor(a!) logits, Tensor targets, " LEEWAY_TOKENS_SCHEMA LEEWAY_RECIPE_SCHEMA
        "float temperature) -> (Tensor loss, Tensor logprob, Tensor entropy, Tensor ratio, Tensor coefficient, "
        "Tensor health)");
}

TORCH_LIBRARY_IMPL(leeway, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(leeway, CUDA, m) { implement(m); }

}  // namespace leeway::bind

// The operators of the token loss on hidden states, whose logits exist a piece at a time.
//
// A row passes the forward product only if its token counts, and the two backward ones only if its slopes are not 0.
// Pieces of logits are as many rows as memory allows; the gradients of several pieces wait in a wave, since every wave
// reads and writes the whole gradient of the weight.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../loss/token_loss.h"
#include "loss.h"
#include "memory.h"
#include "products.h"

namespace leeway::bind {

namespace {

// ---- Rows

// Rows of `columns` elements that begin at multiples of 256 bytes and more, whatever the number of columns.
Tensor aligned_rows(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const int64_t stride = (columns + 127) / 128 * 128;
  return fresh({rows, stride}, options).narrow(1, 0, columns);
}

// How many rows of `bytes` bytes fit into `memory`, at least one; whole tiles of the matrix products where they are many.
int64_t rows_within(int64_t memory, int64_t bytes) {
  const int64_t rows = std::max<int64_t>(1, memory / bytes);
  const int64_t tile = rows < 64 ? 1 : rows < 1024 ? 8 : 256;
  return rows / tile * tile;
}

// Some of N rows, in order; all of them without an index.
struct Selection {
  MaybeTensor index;  // int64 [size]
  int64_t size;

  Tensor of(const Tensor& rows) const { return index ? rows.index_select(0, *index) : rows; }
  Tensor of(const Tensor& rows, int64_t begin, int64_t length) const {
    return index ? rows.index_select(0, index->narrow(0, begin, length)) : rows.narrow(0, begin, length);
  }
  // `values` of the selected rows, and 0 in the other of n.
  Tensor spread(const Tensor& values, int64_t n) const {
    return index ? at::zeros({n}, values.options()).index_copy_(0, *index, values) : values;
  }
};

// The rows where `condition` [N] holds. On CUDA this waits for the device: the sizes of the products must be known.
Selection where(const Tensor& condition) {
  const Tensor index = condition.nonzero().squeeze(1);
  const int64_t size = index.size(0);
  return {size == condition.size(0) ? std::nullopt : MaybeTensor(index), size};
}

Slopes narrow(const Slopes& slopes, int64_t begin, int64_t length) {
  return {slopes.logprob.narrow(0, begin, length),
          slopes.entropy ? MaybeTensor(slopes.entropy->narrow(0, begin, length)) : std::nullopt};
}

Tensor is_active(const Slopes& slopes) {
  const Tensor active = slopes.logprob.ne(0);
  return slopes.entropy ? active.logical_or(slopes.entropy->ne(0)) : active;
}

// Moves the `active` rows of a matrix to its front, each into the place of one that is not. Returns the former numbers
// of the rows in front.
Tensor gather(const Tensor& matrix, const Tensor& is_active, const Selection& active) {
  const Tensor order = at::arange(active.size, is_active.options().dtype(at::kLong));
  if (!active.index) return order;
  const Tensor holes = is_active.narrow(0, 0, active.size).logical_not().nonzero().squeeze(1);
  const int64_t num = holes.size(0), at_once = std::max<int64_t>(1, matrix.size(0) / 16);
  const Tensor last = active.index->narrow(0, active.size - num, num);
  for (int64_t i = 0; i < num; i += at_once) {
    const int64_t length = std::min(at_once, num - i);
    Tensor(matrix).index_copy_(0, holes.narrow(0, i, length), matrix.index_select(0, last.narrow(0, i, length)));
  }
  return order.index_copy(0, holes, last);
}

// ---- The head

struct Wants {
  bool hidden, weight;
  bool any() const { return hidden || weight; }
};

// Logits of selected rows of `hidden`, and what their gradients add to those of the two factors.
class Head {
 public:
  // `slopes` of the selected rows are read when their gradients leave the wave.
  Head(const Tensor& hidden, const Tensor& weight, const Selection& rows, Slopes slopes, int64_t memory, Wants wants)
      : hidden_(hidden), weight_(weight), rows_(rows), slopes_(std::move(slopes)), wants_(wants) {
    const at::ScalarType type = wide(weight.scalar_type()), factor = factor_type(weight);
    const int64_t vocab = weight.size(0), size = c10::elementSize(type), factor_size = c10::elementSize(factor);
    in_place_ = wants.any() && type == factor;
    // Where logits and gradients differ in type, the logits of a quarter of the wave have a buffer of their own.
    const int64_t wave = rows_within(memory, vocab * (wants.any() && !in_place_ ? factor_size + size / 4 : size));
    piece_ = wants.any() && !in_place_ ? std::max<int64_t>(1, wave / 4) : wave;
    const int64_t most = std::max<int64_t>(1, rows.size);
    const auto options = weight.options();
    if (wants.any()) grads_ = aligned_rows(std::min(wave, most), vocab, options.dtype(factor));
    if (!in_place_) logits_ = aligned_rows(std::min(piece_, most), vocab, options.dtype(type));
    d_hidden = wants.hidden ? at::zeros(hidden.sizes(), hidden.options()) : at::empty({0}, hidden.options());
    d_weight = at::empty(wants.weight ? weight.sizes() : at::IntArrayRef{0}, options.dtype(type));
  }

  int64_t piece() const { return piece_; }  // rows of logits at a time

  // The logits of [begin, begin + length), which last until the next ones are made.
  Tensor logits(int64_t begin, int64_t length) {
    if (wants_.any() && filled_ + length > grads_.size(0)) flush();
    const Tensor result = in_place_ ? grad(length) : logits_.narrow(0, 0, length);
    logits_product(rows_.of(hidden_, begin, length).to(factor_type(weight_)), weight_, result);
    return result;
  }

  // Where the gradient of the last logits belongs.
  Tensor grad(int64_t length) const { return grads_.narrow(0, filled_, length); }

  // The gradient of [begin, begin + length), which follow those kept before, is written.
  void keep(int64_t begin, int64_t length) {
    if (filled_ == 0) first_ = begin;
    filled_ += length;
  }

  void finish() {
    flush();
    if (wants_.weight && !summed_) d_weight.zero_();
  }

  Tensor d_hidden, d_weight;

 private:
  void flush() {
    if (filled_ == 0) return;
    const Tensor is_active = bind::is_active(narrow(slopes_, first_, filled_));
    const Selection active = where(is_active);
    const Tensor order = gather(grads_.narrow(0, 0, filled_), is_active, active);
    filled_ = 0;
    if (active.size == 0) return;
    const Tensor grads = grads_.narrow(0, 0, active.size);
    const Tensor place = order.add(first_);
    const Tensor rows = rows_.index ? rows_.index->index_select(0, place) : place;
    if (wants_.weight) {
      weight_product(grads, hidden_.index_select(0, rows).to(grads.scalar_type()), d_weight, !summed_);
      summed_ = true;
    }
    if (wants_.hidden) d_hidden.index_copy_(0, rows, hidden_product(grads, weight_).to(d_hidden.scalar_type()));
  }

  Tensor hidden_, weight_, logits_, grads_;
  Selection rows_;
  Slopes slopes_;
  Wants wants_;
  bool in_place_, summed_ = false;
  int64_t piece_, first_ = 0, filled_ = 0;  // the wave holds the gradients of [first, first + filled)
};

// ---- Tokens

// A stretch of rows whose slopes can be known without other rows.
struct Group {
  int64_t begin, length;
  Tensor cu_seqlens;
};

// Pieces; for a recipe that looks at sequences, as many whole ones as fit into a piece, or one that does not.
std::vector<Group> groups(const Tokens& tokens, const LeewayRecipe& recipe, int64_t piece) {
  std::vector<Group> result;
  const int64_t n = tokens.num_tokens();
  const Tensor& cu = tokens.cu_seqlens;
  if (!is_sequence_level(recipe)) {
    for (int64_t begin = 0; begin < n; begin += piece) {
      const int64_t length = std::min(piece, n - begin);
      result.push_back({begin, length, at::arange(length + 1, cu.options())});
    }
    return result;
  }
  const Tensor host = cu.cpu();
  const int32_t* ends = host.const_data_ptr<int32_t>() + 1;
  const int64_t num = tokens.num_sequences();
  for (int64_t first = 0, begin = 0; first < num;) {
    int64_t last = first + 1;
    while (last < num && ends[last] - begin <= piece) ++last;
    const int64_t length = ends[last - 1] - begin;
    if (length > 0) result.push_back({begin, length, cu.narrow(0, first, last - first + 1).sub(begin)});
    begin += length;
    first = last;
  }
  return result;
}

// The number of `counts` [N] before each of `cu_seqlens`.
Tensor before(const Tensor& counts, const Tensor& cu_seqlens) {
  const Tensor sums = at::cat({at::zeros({1}, cu_seqlens.options()), counts.cumsum(0, at::kInt)});
  return sums.index_select(0, cu_seqlens);
}

// Rows whose logits are needed: of tokens that are not masked and, unless the health of all is wanted, can have slopes.
Tensor is_needed(const Tokens& tokens, const LeewayRecipe& recipe, bool health_of_all) {
  const Tensor unmasked = tokens.mask.ne(0);
  if (health_of_all) return unmasked;
  Tensor counts = tokens.omega.ne(0).logical_and(unmasked);
  if (recipe.divergence == LEEWAY_NO_KL && recipe.entropy_coefficient == 0) {
    counts = counts.logical_and(tokens.advantage.ne(0));
  }
  if (!is_sequence_level(recipe)) return counts;
  const Tensor& cu = tokens.cu_seqlens;
  const Tensor any = before(counts, cu).diff().ne(0);
  return unmasked.logical_and(at::repeat_interleave(any, cu.diff().to(at::kLong), 0, tokens.num_tokens()));
}

// ---- Operators

struct Linear {
  Tensor hidden, weight, targets;
  Expected expected;
  at::ScalarType type;
  double temperature;

  Linear(const Tensor& hidden, const Tensor& weight, const Tensor& given, double temperature)
      : hidden(hidden),
        weight(weight),
        expected{hidden.dim() > 0 ? hidden.size(0) : 0, weight.device()},
        type(wide(weight.scalar_type())),
        temperature(temperature) {
    check_matrix(hidden, "hidden");
    check_matrix(weight, "weight");
    TORCH_CHECK_VALUE(hidden.device() == weight.device(), "hidden: is on ", hidden.device(), ", weight on ",
                      weight.device());
    TORCH_CHECK_VALUE(hidden.size(1) == weight.size(1), "hidden: has ", hidden.size(1), " columns, weight ",
                      weight.size(1));
    TORCH_CHECK_VALUE((hidden.scalar_type() == at::kDouble) == (type == at::kDouble), "hidden: is of type ",
                      hidden.scalar_type(), ", weight of ", weight.scalar_type());
    TORCH_CHECK_VALUE(weight.size(0) > 0, "weight: has no rows");
    check_temperature(temperature);
    targets = bind::targets(given, expected, weight.size(0));
  }

  at::TensorOptions options() const { return weight.options().dtype(type); }
};

void check_memory(int64_t memory) { TORCH_CHECK_VALUE(memory > 0, "memory: must be above 0, not ", memory); }

std::tuple<Tensor, Tensor, Tensor> linear_stats(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                double temperature, int64_t memory) {
  const Linear given(hidden, weight, targets, temperature);
  check_memory(memory);
  const int64_t n = given.expected.size;
  const Stats stats = Stats::empty(n, given.options());
  Head head(hidden, weight, {std::nullopt, n}, {}, memory, {false, false});
  for (int64_t begin = 0; begin < n; begin += head.piece()) {
    const int64_t length = std::min(head.piece(), n - begin);
    row_stats({head.logits(begin, length), given.targets.narrow(0, begin, length), temperature},
              stats.narrow(begin, length));
  }
  return {stats.logprob, stats.entropy, stats.lse};
}

std::tuple<Tensor, Tensor> linear_stats_backward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                 const Tensor& lse, const Tensor& entropy, const Tensor& grad_logprob,
                                                 const MaybeTensor& grad_entropy, double temperature, int64_t memory,
                                                 std::array<bool, 2> wants) {
  const Linear given(hidden, weight, targets, temperature);
  check_memory(memory);
  const auto [expected, type] = std::pair(given.expected, given.type);
  const Slopes slopes{vector(grad_logprob, "grad_logprob", expected, type),
                      vector(grad_entropy, "grad_entropy", expected, type)};
  const Selection rows = where(is_active(slopes));
  const Slopes chosen{rows.of(slopes.logprob), slopes.entropy ? MaybeTensor(rows.of(*slopes.entropy)) : std::nullopt};
  const Stats stats{at::empty({rows.size}, given.options()), rows.of(vector(entropy, "entropy", expected, type)),
                    rows.of(vector(lse, "lse", expected, type))};
  const Tensor chosen_targets = rows.of(given.targets);
  Head head(hidden, weight, rows, chosen, memory, {wants[0], wants[1]});
  for (int64_t begin = 0; begin < rows.size; begin += head.piece()) {
    const int64_t length = std::min(head.piece(), rows.size - begin);
    const Tensor logits = head.logits(begin, length);
    row_grad({logits, chosen_targets.narrow(0, begin, length), temperature}, stats.narrow(begin, length),
             narrow(chosen, begin, length), head.grad(length));
    head.keep(begin, length);
  }
  head.finish();
  return {head.d_hidden, head.d_weight};
}

// One group: its rows' stats, slopes and gradients. Where it does not fit into a piece, its logits are made twice.
void pass(Head& head, const Group& group, const Linear& given, const Tensor& targets, const Tokens& tokens,
          const LeewayRecipe& recipe, const Stats& stats, const Slopes& slopes, bool wants_grad) {
  const Tokens known = tokens.narrow(group.begin, group.length, group.cu_seqlens);
  const Stats out = stats.narrow(group.begin, group.length);
  const Slopes of = narrow(slopes, group.begin, group.length);
  const Terms terms{std::nullopt, of.logprob, of.entropy, std::nullopt};
  Rows rows{{}, {}, given.temperature};
  const auto advance = [&](int64_t begin, int64_t length) {
    rows.logits = head.logits(begin, length);
    rows.targets = targets.narrow(0, begin, length);
  };
  if (wants_grad && !is_sequence_level(recipe)) {
    advance(group.begin, group.length);
    row_loss(rows, known, recipe, out, head.grad(group.length));
    token_terms(known, recipe, out, terms);
    return head.keep(group.begin, group.length);
  }
  const int64_t end = group.begin + group.length;
  for (int64_t begin = group.begin; begin < end; begin += head.piece()) {
    const int64_t length = std::min(head.piece(), end - begin);
    advance(begin, length);
    row_stats(rows, stats.narrow(begin, length));
  }
  if (!wants_grad) return;
  token_terms(known, recipe, out, terms);
  for (int64_t begin = group.begin; begin < end; begin += head.piece()) {
    const int64_t length = std::min(head.piece(), end - begin);
    if (group.length > head.piece()) advance(begin, length);
    row_grad(rows, stats.narrow(begin, length), narrow(slopes, begin, length), head.grad(length));
    head.keep(begin, length);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, LEEWAY_TOKENS_PARAMETERS,
    LEEWAY_RECIPE_PARAMETERS, double temperature, bool health_of_all, int64_t memory, std::array<bool, 2> wants, bool) {
  const Linear given(hidden, weight, targets, temperature);
  check_memory(memory);
  const Expected& expected = given.expected;
  const at::ScalarType type = given.type;
  const Tokens all = LEEWAY_TOKENS;
  const LeewayRecipe recipe = LEEWAY_RECIPE;
  check_recipe(recipe, all);

  const Tensor needed = is_needed(all, recipe, health_of_all);
  const Selection rows = where(needed);
  const Tokens known = rows.index ? all.select(*rows.index, before(needed, all.cu_seqlens)) : all;
  const Tensor known_targets = rows.of(given.targets);
  const auto options = given.options();
  const Stats stats = Stats::empty(rows.size, options);
  const auto vector = [&] { return at::empty({rows.size}, options); };
  const Slopes slopes{vector(), recipe.entropy_coefficient == 0 ? std::nullopt : MaybeTensor(vector())};
  const Wants wanted{wants[0], wants[1]};
  Head head(hidden, weight, rows, slopes, memory, wanted);
  for (const Group& group : groups(known, recipe, head.piece())) {
    pass(head, group, given, known_targets, known, recipe, stats, slopes, wanted.any());
  }
  head.finish();

  const Terms terms{vector(), slopes.logprob, std::nullopt,
                    at::empty({known.num_sequences(), LEEWAY_HEALTH + recipe.num_bins}, options.dtype(at::kDouble))};
  token_terms(known, recipe, stats, terms);
  const Tensor health = total(*terms.health);
  const auto spread = [&](const Tensor& values) { return rows.spread(values, expected.size); };
  return {loss_of(health, type), spread(stats.logprob),      spread(stats.entropy), spread(*terms.ratio),
          spread(slopes.logprob), health, head.d_hidden, head.d_weight};
}

void implement(torch::Library& m) {
  m.impl("linear_stats", linear_stats);
  m.impl("linear_stats_backward", linear_stats_backward);
  m.impl("linear_token_loss", linear_token_loss);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(leeway, m) {
  m.def(
      "linear_stats(Tensor hidden, Tensor weight, Tensor targets, float temperature, int memory) -> (Tensor logprob, "
      "Tensor entropy, Tensor lse)");
  m.def(
      "linear_stats_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor lse, Tensor entropy, "
      "Tensor grad_logprob, Tensor? grad_entropy, float temperature, int memory, bool[2] wants) -> (Tensor d_hidden, "
      "Tensor d_weight)");
  m.def("linear_token_loss(Tensor hidden, Tensor weight, Tensor targets, " LEEWAY_TOKENS_SCHEMA LEEWAY_RECIPE_SCHEMA
        "float temperature, bool health_of_all, int memory, bool[2] wants, bool reuse) -> (Tensor loss, Tensor logprob, "
        "Tensor entropy, Tensor ratio, Tensor coefficient, Tensor health, Tensor d_hidden, Tensor d_weight)");
}

TORCH_LIBRARY_IMPL(leeway, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(leeway, CUDA, m) { implement(m); }

}  // namespace leeway::bind

// The kernels of the token loss on tensors, on whichever device these are.
//
// Every function here takes arguments that have been checked, contiguous but for the rows of logits, and writes tensors
// that the caller has allocated.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/string_view.h>

#include <optional>
#include <string>
#include <vector>

#include "../api/loss.h"

namespace leeway::bind {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

struct Tokens {
  Tensor cu_seqlens, behaviour, advantage, mask, omega;
  MaybeTensor proximal, reference, staleness;
  bool moved;

  int64_t num_tokens() const { return behaviour.size(0); }
  int64_t num_sequences() const { return cu_seqlens.size(0) - 1; }
  // Those of `rows`, in `cu_seqlens`.
  Tokens select(const Tensor& rows, const Tensor& cu_seqlens) const;
  // [begin, begin + length), in `cu_seqlens`.
  Tokens narrow(int64_t begin, int64_t length, const Tensor& cu_seqlens) const;
  LeewayTokens view() const;
};

// What a row's distribution says of its target: each [N].
struct Stats {
  Tensor logprob, entropy, lse;

  static Stats empty(int64_t n, const at::TensorOptions& options);
  Stats narrow(int64_t begin, int64_t length) const;
};

// Rows of logits and their targets.
struct Rows {
  Tensor logits, targets;
  double temperature;

  LeewayRows view(const Stats& stats) const;
};

struct Slopes {
  Tensor logprob;       // [N] d loss / d logprob
  MaybeTensor entropy;  // [N] d loss / d entropy; none: 0
};

// Of each token; `health` [S, LEEWAY_HEALTH + num_bins] of each sequence. Any may be none.
struct Terms {
  MaybeTensor ratio, coefficient, slope_entropy, health;
};

void row_stats(const Rows& rows, const Stats& out);
void row_grad(const Rows& rows, const Stats& stats, const Slopes& slopes, const Tensor& grad);
void row_loss(const Rows& rows, const Tokens& tokens, const LeewayRecipe& recipe, const Stats& out, const Tensor& grad);
void token_terms(const Tokens& tokens, const LeewayRecipe& recipe, const Stats& stats, const Terms& out);

// [LEEWAY_HEALTH + num_bins]: the sum over sequences, in their order.
Tensor total(const Tensor& health);
// The scalar among those sums.
Tensor loss_of(const Tensor& health, at::ScalarType type);

// ---- Arguments

// The type of sums over logits of type `type`.
inline at::ScalarType wide(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// What a vector of an operator must be. `vector` returns it contiguous, or raises, naming it.
struct Expected {
  int64_t size;
  at::Device device;
};
Tensor vector(const Tensor& given, const char* name, const Expected& expected, at::ScalarType type);
MaybeTensor vector(const MaybeTensor& given, const char* name, const Expected& expected, at::ScalarType type);
Tensor targets(const Tensor& given, const Expected& expected, int64_t vocab);
void check_temperature(double temperature);
void check_matrix(const Tensor& given, const char* name);

// The schema and the parameters that the operators of the token loss have in common, and what they are in C++.
#define LEEWAY_TOKENS_SCHEMA                                                                                      \
  "Tensor cu_seqlens, Tensor behaviour, Tensor? proximal, Tensor? reference, Tensor advantage, Tensor mask, "     \
  "Tensor omega, Tensor? staleness, bool moved, "
#define LEEWAY_TOKENS_PARAMETERS                                                                                  \
  const Tensor &cu_seqlens, const Tensor &behaviour, const MaybeTensor &proximal, const MaybeTensor &reference,   \
      const Tensor &advantage, const Tensor &mask, const Tensor &omega, const MaybeTensor &staleness, bool moved
#define LEEWAY_TOKENS                                                                                             \
  ::leeway::bind::tokens(                                                                                         \
      {cu_seqlens, behaviour, advantage, mask, omega, proximal, reference, staleness, moved}, expected, type)

#define LEEWAY_RECIPE_SCHEMA                                                                                      \
  "str surrogate, float[] surrogate_args, str correction, float[] correction_args, str divergence, "              \
  "float[] divergence_args, float entropy_coefficient, int num_bins, "
#define LEEWAY_RECIPE_PARAMETERS                                                                                  \
  c10::string_view surrogate, at::ArrayRef<double> surrogate_args, c10::string_view correction,                   \
      at::ArrayRef<double> correction_args, c10::string_view divergence, at::ArrayRef<double> divergence_args,    \
      double entropy_coefficient, int64_t num_bins
#define LEEWAY_RECIPE                                                                                             \
  ::leeway::bind::recipe({surrogate, surrogate_args}, {correction, correction_args},                              \
                         {divergence, divergence_args}, entropy_coefficient, num_bins)

struct Slot {
  c10::string_view name;
  at::ArrayRef<double> args;
};
Tokens tokens(Tokens given, const Expected& expected, at::ScalarType type);
LeewayRecipe recipe(const Slot& surrogate, const Slot& correction, const Slot& divergence, double entropy_coefficient,
                    int64_t num_bins);
// The names that a slot ("surrogate", "correction", "divergence") may have.
std::vector<std::string> slot_names(c10::string_view slot);
// Checks what `recipe` needs of `tokens`.
void check_recipe(const LeewayRecipe& recipe, const Tokens& tokens);

}  // namespace leeway::bind

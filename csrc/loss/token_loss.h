// The loss of a token and its slopes: the slots of engine/algorithms on one token, for the host and for CUDA.
//
//     loss = omega (w phi + beta k - eta H)          r = pi / pi_proximal    rho = pi_proximal / pi_behaviour
//
// The Python functions of the same names hold the formulas and their sources, and are what this must agree with. Here
// stands with each value its derivative by the token's log-probability, so that nothing else is needed to go backward:
//
//     d loss / d z_j = 1/temperature (c (1[j = target] - p_j) + eta omega p_j (log p_j + H)),    c = d loss / d log pi
//
// Most recipes look at a token alone: `terms` with the stats of an unread sequence. Where `is_sequence_level`, every
// token of a sequence goes through `add`, the sums through `sequence_stats`; for GSPO, through whose ratio each token
// reaches all others, then every token through `pull`, whose sum belongs into the stats; and at last through `terms`.
//
// NaN in gives NaN out: comparisons are written so that they never hide one.
#pragma once

#include <cmath>

#include "../api/loss.h"
#include "../common/device.h"

namespace leeway {

template <typename T>
struct Recipe {
  int32_t surrogate, correction, divergence;
  double surrogate_args[3], correction_args[3];
  T beta, eta;
  bool corrected;
};

template <typename T>
struct Token {
  T logprob, entropy, behaviour, proximal, reference, advantage, omega;
  bool masked;
};

struct SequenceSums {  // over the sequence's unmasked tokens
  double count = 0, log_ratio = 0, log_rho = 0;
};

template <typename T>
struct SequenceStats {
  T ratio = 1;         // geometric mean of r
  T ratio_slope = 0;   // of `ratio` by the log-probability of one of its tokens, over `ratio`: 1/n, 0 beyond the bound
  T weight = 1;        // of the corrections that weigh a sequence as one
  T pull = 0;          // sum of `pull` over the sequence
};

template <typename T>
struct Terms {
  T loss = 0;
  T coefficient = 0;    // d loss / d logprob
  T slope_entropy = 0;  // d loss / d entropy
  T ratio = 0;          // that the surrogate clips: r, or the sequence's for both GSPO
  T weight = 0;         // w
  T kl = 0;             // k, without its coefficient
  bool clipped = false;
};

// A value and its derivative by the token's log-probability.
template <typename T>
struct Slope {
  T value, slope;
};

template <typename T>
struct Surrogate {
  T phi, slope;
  bool clipped;
};

// exp(log_ratio) with the log-ratio within +-20, where the derivative ends.
template <typename T>
LEEWAY_HD Slope<T> bounded_exp(T log_ratio) {
  const T limit = 20;
  if (log_ratio > limit) return {std::exp(limit), 0};
  if (log_ratio < -limit) return {std::exp(-limit), 0};
  const T r = std::exp(log_ratio);
  return {r, r};
}

template <typename T>
LEEWAY_HD T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

template <typename T>
LEEWAY_HD Recipe<T> recipe(const LeewayRecipe& given) {
  Recipe<T> recipe{given.surrogate, given.correction, given.divergence, {}, {}, 0, T(given.entropy_coefficient), false};
  for (int i = 0; i < 3; ++i) {
    recipe.surrogate_args[i] = given.surrogate_args[i];
    recipe.correction_args[i] = given.correction_args[i];
  }
  if (given.divergence != LEEWAY_NO_KL) {
    recipe.beta = T(given.divergence_args[0]);
    recipe.corrected = given.divergence_args[1] == 1;
  }
  return recipe;
}

LEEWAY_HD bool is_sequence_level(const LeewayRecipe& recipe) {
  return recipe.surrogate == LEEWAY_GSPO || recipe.surrogate == LEEWAY_GSPO_TOKEN ||
         recipe.correction == LEEWAY_SEQUENCE || recipe.correction == LEEWAY_SEQUENCE_MASK;
}

// Token i, with what the policy makes of it.
template <typename T>
LEEWAY_HD Token<T> token(const LeewayTokens& tokens, int64_t i, T logprob, T entropy) {
  const auto at = [i](const void* array) { return static_cast<const T*>(array)[i]; };
  return {logprob,
          entropy,
          at(tokens.behaviour),
          tokens.proximal ? at(tokens.proximal) : logprob,
          tokens.reference ? at(tokens.reference) : logprob,
          at(tokens.advantage),
          at(tokens.omega),
          at(tokens.mask) == 0};
}

// ---- Whole sequences

template <typename T>
LEEWAY_HD void add(SequenceSums& sums, const Token<T>& token) {
  if (token.masked) return;
  sums.count += 1;
  sums.log_ratio += double(token.logprob - token.proximal);
  sums.log_rho += double(token.proximal - token.behaviour);
}

template <typename T>
LEEWAY_HD SequenceStats<T> sequence_stats(const Recipe<T>& recipe, const SequenceSums& sums) {
  SequenceStats<T> stats;
  if (sums.count == 0) return stats;
  const Slope<T> ratio = bounded_exp(T(sums.log_ratio / sums.count));
  stats.ratio = ratio.value;
  stats.ratio_slope = ratio.slope == 0 ? T(0) : T(1 / sums.count);
  const double* args = recipe.correction_args;
  const bool mask = recipe.correction == LEEWAY_SEQUENCE_MASK;
  const bool geometric = args[mask ? 2 : 1] == 1;
  const T s = bounded_exp(T(geometric ? sums.log_rho / sums.count : sums.log_rho)).value;
  if (mask) {
    stats.weight = s < T(args[0]) || s > T(args[1]) ? T(0) : s;
  } else if (recipe.correction == LEEWAY_SEQUENCE) {
    stats.weight = s > T(args[0]) ? T(args[0]) : s;
  }
  return stats;
}

// ---- Corrections

template <typename T>
LEEWAY_HD T weight(const Recipe<T>& recipe, const Token<T>& token, const SequenceStats<T>& stats) {
  if (recipe.correction == LEEWAY_UNCORRECTED) return 1;
  if (recipe.correction == LEEWAY_SEQUENCE || recipe.correction == LEEWAY_SEQUENCE_MASK) return stats.weight;
  const T rho = bounded_exp(token.proximal - token.behaviour).value;
  const double* args = recipe.correction_args;
  if (recipe.correction == LEEWAY_TIS) return rho > T(args[0]) ? T(args[0]) : rho;
  if (recipe.correction == LEEWAY_ICEPOP_WEIGHT) return rho < T(args[0]) || rho > T(args[1]) ? T(0) : rho;
  return rho;
}

// ---- Surrogates

// The pessimistic one of the surrogate and its clipped version. `slope` is d r / d logprob.
template <typename T>
LEEWAY_HD Surrogate<T> clip(Slope<T> r, T advantage, const double* args) {
  const T free = -advantage * r.value;
  const T held = -advantage * clamp(r.value, T(1 - args[0]), T(1 + args[1]));
  if (held > free) return {held, 0, true};
  return {free, -advantage * r.slope, false};
}

template <typename T>
LEEWAY_HD Surrogate<T> ppo_clip(Slope<T> r, T advantage, const double* args) {
  const Surrogate<T> clipped = clip(r, advantage, args);
  if (advantage < 0 && r.value > T(args[2])) return {-advantage * T(args[2]), 0, true};  // NaN: no dual clip
  return clipped;
}

template <typename T>
LEEWAY_HD Surrogate<T> cispo(Slope<T> r, const Token<T>& token, const double* args) {
  const T weight = clamp(r.value, T(1 - args[1]), T(1 + args[0]));
  return {-weight * token.advantage * token.logprob, -weight * token.advantage, weight != r.value};
}

template <typename T>
LEEWAY_HD Surrogate<T> icepop(Slope<T> r, T advantage, const double* args) {
  if (r.value < T(args[0]) || r.value > T(args[1])) return {0, 0, true};
  return {-advantage * r.value, -advantage * r.slope, false};
}

template <typename T>
LEEWAY_HD Surrogate<T> dppo(Slope<T> r, const Token<T>& token, const double* args) {
  const T moved = std::exp(token.logprob) - std::exp(token.proximal);
  const T advantage = token.advantage;
  if ((advantage > 0 && moved > T(args[1])) || (advantage < 0 && moved < T(-args[0]))) return {0, 0, true};
  return {-advantage * r.value, -advantage * r.slope, false};
}

template <typename T>
LEEWAY_HD Surrogate<T> sapo(Slope<T> r, T advantage, const double* args) {
  const T tau = T(args[advantage > 0 ? 0 : 1]);
  const T x = tau * (r.value - 1);
  const T gate = 1 / (1 + std::exp(-x));
  const T rest = 1 / (1 + std::exp(x));  // 1 - gate, exact where the gate is nearly 1
  return {-advantage * 4 * gate / tau, -advantage * 4 * gate * rest * r.slope, false};
}

// `slope` leaves out what GSPO's ratio gets from the sequence's other tokens.
template <typename T>
LEEWAY_HD Surrogate<T> surrogate(const Recipe<T>& recipe, const Token<T>& token, Slope<T> r,
                                 const SequenceStats<T>& stats) {
  const T advantage = token.advantage;
  const double* args = recipe.surrogate_args;
  switch (recipe.surrogate) {
    case LEEWAY_REINFORCE: return {-advantage * token.logprob, -advantage, false};
    case LEEWAY_IMPORTANCE: return {-advantage * r.value, -advantage * r.slope, false};
    case LEEWAY_PPO_CLIP: return ppo_clip(r, advantage, args);
    case LEEWAY_CISPO: return cispo(r, token, args);
    case LEEWAY_ICEPOP: return icepop(r, advantage, args);
    case LEEWAY_DPPO: return dppo(r, token, args);
    case LEEWAY_SAPO: return sapo(r, advantage, args);
    default: return clip(Slope<T>{stats.ratio, stats.ratio}, advantage, args);  // both GSPO
  }
}

// ---- Divergences

// An estimate of the KL divergence from one log-ratio d = log pi - log pi_other, and its derivative by d.
template <typename T>
LEEWAY_HD Slope<T> estimate(int32_t divergence, T d) {
  if (divergence == LEEWAY_K1) return {d, 1};
  if (divergence == LEEWAY_K2) return {d * d / 2, d};
  const T limit = 20;
  const T held = clamp(d, -limit, limit);
  const T decay = std::expm1(-held);
  return {decay + held, held != d && d == d ? T(0) : -decay};
}

// k; corrected, r k.
template <typename T>
LEEWAY_HD Slope<T> divergence(const Recipe<T>& recipe, const Token<T>& token, Slope<T> r) {
  if (recipe.divergence == LEEWAY_NO_KL) return {0, 0};
  const Slope<T> k = estimate(recipe.divergence, token.logprob - token.reference);
  if (!recipe.corrected) return k;
  return {r.value * k.value, r.slope * k.value + r.value * k.slope};
}

// ---- The token

// What the token adds to the slope of its sequence's GSPO ratio.
template <typename T>
LEEWAY_HD T pull(const Recipe<T>& recipe, const Token<T>& token, const SequenceStats<T>& stats) {
  if (token.masked || recipe.surrogate != LEEWAY_GSPO) return 0;
  const Slope<T> own{1, 0};
  return token.omega * weight(recipe, token, stats) * surrogate(recipe, token, own, stats).slope;
}

template <typename T>
LEEWAY_HD Terms<T> terms(const Recipe<T>& recipe, const Token<T>& token, const SequenceStats<T>& stats) {
  if (token.masked) return {};
  const Slope<T> r = bounded_exp(token.logprob - token.proximal);
  const Surrogate<T> phi = surrogate(recipe, token, r, stats);
  const Slope<T> k = divergence(recipe, token, r);
  const T w = weight(recipe, token, stats);
  const bool gspo = recipe.surrogate == LEEWAY_GSPO;
  const T entropy = recipe.eta == 0 ? T(0) : recipe.eta * token.entropy;

  Terms<T> terms;
  terms.loss = token.omega * (w * phi.phi + recipe.beta * k.value - entropy);
  terms.coefficient = token.omega * ((gspo ? T(0) : w * phi.slope) + recipe.beta * k.slope);
  if (gspo) terms.coefficient += stats.ratio_slope * stats.pull;
  terms.slope_entropy = -recipe.eta * token.omega;
  terms.ratio = gspo || recipe.surrogate == LEEWAY_GSPO_TOKEN ? stats.ratio : r.value;
  terms.weight = w;
  terms.kl = k.value;
  terms.clipped = phi.clipped;
  return terms;
}

template <typename T>
LEEWAY_HD void store(const LeewayTerms& out, int64_t i, const Terms<T>& terms) {
  const auto put = [i](void* array, T value) {
    if (array) static_cast<T*>(array)[i] = value;
  };
  put(out.loss, terms.loss);
  put(out.ratio, terms.ratio);
  put(out.coefficient, terms.coefficient);
  put(out.slope_entropy, terms.slope_entropy);
}

// ---- Health

// What an unmasked token adds to each sum of LEEWAY_HEALTH_NAMES. `own`: sampled with the very weights of the policy.
template <typename T>
LEEWAY_HD void health(const Token<T>& token, const Terms<T>& terms, bool own, double (&sums)[LEEWAY_HEALTH]) {
  const T d = token.behaviour - token.logprob;
  const T drift = std::abs(d);
  const T rho = bounded_exp(-d).value;
  const double figures[] = {1,
                            terms.loss,
                            drift,
                            rho,
                            rho * rho,
                            double(own),
                            own ? drift : T(0),
                            double(terms.clipped),
                            terms.weight,
                            double(terms.weight == 0),
                            terms.kl,
                            token.entropy,
                            estimate(LEEWAY_K1, d).value,
                            estimate(LEEWAY_K2, d).value,
                            estimate(LEEWAY_K3, d).value};
  static_assert(sizeof(figures) / sizeof(double) == LEEWAY_HEALTH);
  for (int i = 0; i < LEEWAY_HEALTH; ++i) sums[i] += figures[i];
}

LEEWAY_HD bool is_own(const LeewayTokens& tokens, int64_t i) {
  return tokens.staleness && !tokens.moved && tokens.staleness[i] == 0;
}

// The bin of the staleness histogram, whose last one is open.
LEEWAY_HD int32_t bin(int32_t staleness, int32_t num_bins) {
  return staleness < 0 ? 0 : staleness < num_bins ? staleness : num_bins - 1;
}

}  // namespace leeway

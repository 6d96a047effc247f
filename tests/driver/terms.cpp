// Tokens under every composition of a recipe, against the formulas of engine/algorithms evaluated one sequence at a
// time; slopes against differences of those.
#include <cmath>
#include <limits>

#include "loss.h"

namespace driver {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
constexpr int kBins = 4;

double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
double ratio(double log_ratio) { return std::exp(clamp(log_ratio, -20, 20)); }

// N tokens in sequences, some of them empty; masked tokens hold nothing but NaN.
template <typename T>
struct TokensOf {
  TokensOf(Random& random, std::vector<int32_t> lengths)
      : cu_seqlens(lengths.size() + 1, 0),
        size([&] {
          for (size_t s = 0; s < lengths.size(); ++s) cu_seqlens[s + 1] = cu_seqlens[s] + lengths[s];
          return cu_seqlens[lengths.size()];
        }()),
        logprob(size), entropy(size), behaviour(size), proximal(size), reference(size), advantage(size),
        mask(size, 0), omega(size, 0), staleness(size, 0) {
    for (int64_t i = 0; i < size; ++i) {
      staleness[i] = int32_t(random.below(6));
      if (random.below(5) == 0) continue;
      mask[i] = 1;
      omega[i] = T(random.uniform(0.1, 1));
      logprob[i] = T(random.uniform(-5, -0.01));
      entropy[i] = T(random.uniform(0, 3));
      const double far = random.below(30) == 0 ? 25 : 0.4;
      proximal[i] = T(logprob[i] + random.uniform(-far, far));
      behaviour[i] = T(proximal[i] + random.uniform(-0.5, 0.5));
      reference[i] = T(logprob[i] + random.uniform(-2.5 * far, 2.5 * far));
      advantage[i] = random.below(6) == 0 ? T(0) : T(random.uniform(-2, 2));
    }
  }

  LeewayTokens view(bool with_proximal, bool moved) {
    return {size, int64_t(cu_seqlens.size()) - 1, cu_seqlens.data(), behaviour.data(),
            with_proximal ? proximal.data() : nullptr, reference.data(), advantage.data(), mask.data(), omega.data(),
            staleness.data(), moved, number(T{}).type};
  }

  Array<int32_t> cu_seqlens;
  const int64_t size;
  Array<T> logprob, entropy, behaviour, proximal, reference, advantage, mask, omega;
  Array<int32_t> staleness;
};

// The loss of one sequence as a function of its tokens' log-probabilities `live`; what takes no part in the gradient is
// made of `still`, the same log-probabilities.
template <typename T>
double loss_of(const LeewayRecipe& recipe, const TokensOf<T>& tokens, bool with_proximal, int64_t begin, int64_t end,
               const std::vector<double>& live, const std::vector<double>& still) {
  const double* a = recipe.surrogate_args;
  const double* b = recipe.correction_args;
  const auto proximal = [&](int64_t i) { return with_proximal ? double(tokens.proximal[i]) : still[i - begin]; };
  double count = 0, log_r = 0, log_r_still = 0, log_rho = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (tokens.mask[i] == 0) continue;
    count += 1;
    log_r += live[i - begin] - proximal(i);
    log_r_still += still[i - begin] - proximal(i);
    log_rho += proximal(i) - tokens.behaviour[i];
  }
  double total = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (tokens.mask[i] == 0) continue;
    const double l = live[i - begin], o = proximal(i), A = tokens.advantage[i];
    const double r = ratio(l - o), r_still = ratio(still[i - begin] - o);
    const double s = ratio(log_r / count), s_token = ratio(log_r_still / count) * std::exp(l - still[i - begin]);
    const auto clipped = [&](double r) {
      return std::fmax(-A * r, -A * clamp(r, 1 - a[0], 1 + a[1]));
    };
    double phi = 0;
    if (recipe.surrogate == LEEWAY_REINFORCE) phi = -A * l;
    if (recipe.surrogate == LEEWAY_IMPORTANCE) phi = -A * r;
    if (recipe.surrogate == LEEWAY_PPO_CLIP) {
      phi = clipped(r);
      if (A < 0 && !std::isnan(a[2])) phi = std::fmin(phi, -A * a[2]);
    }
    if (recipe.surrogate == LEEWAY_CISPO) phi = -clamp(r_still, 1 - a[1], 1 + a[0]) * A * l;
    if (recipe.surrogate == LEEWAY_ICEPOP) phi = r_still >= a[0] && r_still <= a[1] ? -A * r : 0;
    if (recipe.surrogate == LEEWAY_DPPO) {
      const double moved = std::exp(still[i - begin]) - std::exp(o);
      phi = (A > 0 && moved > a[1]) || (A < 0 && moved < -a[0]) ? 0 : -A * r;
    }
    if (recipe.surrogate == LEEWAY_SAPO) {
      const double tau = A > 0 ? a[0] : a[1];
      phi = -A * 4 / (tau * (1 + std::exp(-tau * (r - 1))));
    }
    if (recipe.surrogate == LEEWAY_GSPO) phi = clipped(s);
    if (recipe.surrogate == LEEWAY_GSPO_TOKEN) phi = clipped(s_token);

    const double rho = ratio(o - tokens.behaviour[i]);
    const double product = ratio(log_rho), mean = ratio(log_rho / count);
    double w = 1;
    if (recipe.correction == LEEWAY_DECOUPLED) w = rho;
    if (recipe.correction == LEEWAY_TIS) w = std::fmin(rho, b[0]);
    if (recipe.correction == LEEWAY_ICEPOP_WEIGHT) w = rho >= b[0] && rho <= b[1] ? rho : 0;
    if (recipe.correction == LEEWAY_SEQUENCE) w = std::fmin(b[1] == 1 ? mean : product, b[0]);
    if (recipe.correction == LEEWAY_SEQUENCE_MASK) {
      const double s = b[2] == 1 ? mean : product;
      w = s >= b[0] && s <= b[1] ? s : 0;
    }

    const double d = l - tokens.reference[i], bounded = clamp(d, -20, 20);
    double k = 0;
    if (recipe.divergence == LEEWAY_K1) k = d;
    if (recipe.divergence == LEEWAY_K2) k = d * d / 2;
    if (recipe.divergence == LEEWAY_K3) k = std::exp(-bounded) - 1 + bounded;
    if (recipe.divergence != LEEWAY_NO_KL) k *= recipe.divergence_args[0] * (recipe.divergence_args[1] == 1 ? r : 1);

    total += tokens.omega[i] * (w * phi + k - recipe.entropy_coefficient * tokens.entropy[i]);
  }
  return total;
}

template <typename T>
struct TermsOf {
  TermsOf(int64_t num_tokens, int64_t num_sequences)
      : loss(num_tokens), ratio(num_tokens), coefficient(num_tokens), slope_entropy(num_tokens),
        health(num_sequences * (LEEWAY_HEALTH + kBins)) {}
  LeewayTerms view() {
    return {loss.data(), ratio.data(), coefficient.data(), slope_entropy.data(), health.data()};
  }
  bool same_bits(const TermsOf& other) const {
    return loss.same_bits(other.loss) && ratio.same_bits(other.ratio) && coefficient.same_bits(other.coefficient) &&
           slope_entropy.same_bits(other.slope_entropy) && health.same_bits(other.health);
  }
  Array<T> loss, ratio, coefficient, slope_entropy;
  Array<double> health;
};

template <typename T>
TermsOf<T> terms(Device device, const LeewayRecipe& recipe, TokensOf<T>& tokens, bool with_proximal, bool moved) {
  const LeewayTokens view = tokens.view(with_proximal, moved);
  TermsOf<T> terms(tokens.size, view.num_sequences);
  const LeewayTerms out = terms.view();
  if (device == Device::cpu) {
    leeway_token_terms_cpu(&view, &recipe, tokens.logprob.data(), tokens.entropy.data(), &out, 0, view.num_sequences);
  } else {
    finish(leeway_token_terms_cuda(&view, &recipe, tokens.logprob.data(), tokens.entropy.data(), &out, nullptr));
  }
  return terms;
}

// A recipe's name in the message of a check that fails.
struct Name {
  explicit Name(const LeewayRecipe& r, bool with_proximal, size_t bytes) {
    snprintf(text, sizeof text, "surrogate %d, correction %d, divergence %d (corrected %g), eta %g, proximal %d, %zu",
             r.surrogate, r.correction, r.divergence, r.divergence_args[1], r.entropy_coefficient, with_proximal,
             bytes);
  }
  char text[160];
};

template <typename T>
void compare(const LeewayRecipe& recipe, TokensOf<T>& tokens, bool with_proximal, const TermsOf<T>& terms) {
  const Name name(recipe, with_proximal, sizeof(T));
  const double precision = sizeof(T) == 8 ? 1e-7 : 3e-5, step = 1e-5;
  for (size_t s = 0; s + 1 < tokens.cu_seqlens.size(); ++s) {
    const int64_t begin = tokens.cu_seqlens[s], end = tokens.cu_seqlens[s + 1];
    const std::vector<double> still(tokens.logprob.data() + begin, tokens.logprob.data() + end);
    double loss = 0, greatest = 1;
    for (int64_t i = begin; i < end; ++i) {
      loss += terms.loss[i];
      greatest = std::fmax(greatest, std::fabs(terms.loss[i]));
    }
    const double expected = loss_of(recipe, tokens, with_proximal, begin, end, still, still);
    REQUIRE(std::fabs(loss - expected) <= precision * greatest, "%s: loss %g, not %g", name.text, loss, expected);
    for (int64_t i = begin; i < end; ++i) {
      if (tokens.mask[i] == 0) {
        REQUIRE(terms.loss[i] == 0 && terms.coefficient[i] == 0 && terms.slope_entropy[i] == 0 && terms.ratio[i] == 0,
                "%s: masked token %ld", name.text, long(i));
        continue;
      }
      std::vector<double> up = still, down = still;
      up[i - begin] += step;
      down[i - begin] -= step;
      const double slope = (loss_of(recipe, tokens, with_proximal, begin, end, up, still) -
                            loss_of(recipe, tokens, with_proximal, begin, end, down, still)) /
                           (2 * step);
      REQUIRE(std::fabs(terms.coefficient[i] - slope) <= 10 * precision * greatest, "%s: token %ld: slope %g, not %g",
              name.text, long(i), double(terms.coefficient[i]), slope);
      const double by_entropy = -recipe.entropy_coefficient * tokens.omega[i];
      REQUIRE(std::fabs(terms.slope_entropy[i] - by_entropy) <= precision, "%s", name.text);
      if (recipe.surrogate != LEEWAY_GSPO && recipe.surrogate != LEEWAY_GSPO_TOKEN) {
        const double r = with_proximal ? ratio(double(tokens.logprob[i]) - tokens.proximal[i]) : 1;
        REQUIRE(std::fabs(terms.ratio[i] - r) <= precision * r, "%s: ratio", name.text);
      }
    }
  }
}

// Options such that random tokens fall on both sides of every bound.
LeewayRecipe recipe(int surrogate, int correction, int divergence, bool corrected, bool geometric, double eta) {
  const double surrogates[][3] = {{kNone, kNone, kNone}, {kNone, kNone, kNone}, {0.1, 0.2, 1.3},
                                  {0.2, 0.3, kNone},     {0.8, 1.2, kNone},     {0.05, 0.06, kNone},
                                  {1, 1.5, kNone},       {0.02, 0.03, kNone},   {0.02, 0.03, kNone}};
  const double corrections[][3] = {{kNone, kNone, kNone},          {kNone, kNone, kNone}, {1.1, kNone, kNone},
                                   {0.8, 1.2, kNone},              {1.05, double(geometric), kNone},
                                   {0.9, 1.15, double(geometric)}};
  LeewayRecipe recipe{surrogate, correction, divergence, kBins, {}, {}, {0.3, double(corrected)}, eta};
  for (int i = 0; i < 3; ++i) {
    recipe.surrogate_args[i] = surrogates[surrogate][i];
    recipe.correction_args[i] = corrections[correction][i];
  }
  return recipe;
}

// visit(recipe, devices)
template <typename Visit>
void for_every_recipe(Visit visit) {
  int number = 0;
  for (int surrogate = LEEWAY_REINFORCE; surrogate <= LEEWAY_GSPO_TOKEN; ++surrogate) {
    for (int correction = LEEWAY_UNCORRECTED; correction <= LEEWAY_SEQUENCE_MASK; ++correction) {
      for (int divergence = LEEWAY_NO_KL; divergence <= LEEWAY_K3; ++divergence) {
        for (int options = 0; options < 8; ++options) {
          visit(recipe(surrogate, correction, divergence, options & 1, options & 2, options & 4 ? 0.02 : 0),
                devices(number++));
        }
      }
    }
  }
}

}  // namespace

CHECK(tokens_under_every_recipe) {
  Random random(21);
  for_every_recipe([&](const LeewayRecipe& recipe, const std::vector<Device>& devices) {
    TokensOf<double> exact(random, {5, 0, 1, 9});
    TokensOf<float> rounded(random, {5, 0, 1, 9});
    for (Device device : devices) {
      for (bool with_proximal : {true, false}) {
        compare(recipe, exact, with_proximal, terms(device, recipe, exact, with_proximal, false));
        compare(recipe, rounded, with_proximal, terms(device, recipe, rounded, with_proximal, false));
      }
    }
  });
}

CHECK(dual_clip_is_left_out_where_none) {
  Random random(22);
  TokensOf<double> tokens(random, {40});
  LeewayRecipe recipe = driver::recipe(LEEWAY_PPO_CLIP, LEEWAY_UNCORRECTED, LEEWAY_NO_KL, false, false, 0);
  recipe.surrogate_args[2] = kNone;
  for (Device device : devices()) compare(recipe, tokens, true, terms(device, recipe, tokens, true, false));
}

// At its very bounds the ratio still counts as within them.
CHECK(ratios_at_the_bounds_are_not_clipped) {
  const LeewayRecipe recipe{LEEWAY_PPO_CLIP, LEEWAY_UNCORRECTED, LEEWAY_NO_KL, kBins, {0, 0, 1}, {}, {}, 0};
  Random random(23);
  for (Device device : devices()) {
    TokensOf<float> tokens(random, {30});
    for (int64_t i = 0; i < tokens.size; ++i) tokens.proximal[i] = tokens.logprob[i];
    const TermsOf<float> terms = driver::terms(device, recipe, tokens, true, false);
    for (int64_t i = 0; i < tokens.size; ++i) {
      const float slope = tokens.mask[i] == 0 ? 0 : -tokens.omega[i] * tokens.advantage[i];
      REQUIRE(terms.coefficient[i] == slope, "token %ld: %g", long(i), double(terms.coefficient[i]));
    }
    REQUIRE(terms.health[7] == 0, "%g clipped", terms.health[7]);
  }
}

CHECK(nan_is_never_hidden) {
  Random random(24);
  for_every_recipe([&](const LeewayRecipe& recipe, const std::vector<Device>& devices) {
    const Name name(recipe, true, sizeof(float));
    for (Device device : devices) {
      TokensOf<float> tokens(random, {3});
      for (int64_t i = 0; i < 3; ++i) {
        tokens.mask[i] = tokens.omega[i] = tokens.advantage[i] = 1;
        tokens.logprob[i] = tokens.proximal[i] = tokens.behaviour[i] = tokens.reference[i] = -1;
        tokens.entropy[i] = 0;
      }
      tokens.logprob[1] = float(kNone);
      REQUIRE(std::isnan(terms(device, recipe, tokens, true, false).loss[1]), "%s: log-probability", name.text);
      if (recipe.correction == LEEWAY_UNCORRECTED) continue;
      tokens.logprob[1] = -1;
      tokens.behaviour[1] = float(kNone);
      REQUIRE(std::isnan(terms(device, recipe, tokens, true, false).loss[1]), "%s: behaviour", name.text);
    }
  });
}

CHECK(health_is_summed_over_each_sequence) {
  Random random(25);
  for (bool moved : {false, true}) {
    for (Device device : devices()) {
      TokensOf<double> tokens(random, {6, 0, 11});
      const LeewayRecipe recipe = driver::recipe(LEEWAY_PPO_CLIP, LEEWAY_ICEPOP_WEIGHT, LEEWAY_K2, false, false, 0.02);
      const TermsOf<double> terms = driver::terms(device, recipe, tokens, true, moved);
      for (int s = 0; s < 3; ++s) {
        double sums[LEEWAY_HEALTH + kBins] = {};
        for (int64_t i = tokens.cu_seqlens[s]; i < tokens.cu_seqlens[s + 1]; ++i) {
          if (tokens.mask[i] == 0) continue;
          const double d = tokens.behaviour[i] - tokens.logprob[i], r = ratio(tokens.logprob[i] - tokens.proximal[i]);
          const double rho = ratio(tokens.proximal[i] - tokens.behaviour[i]);
          const double k = tokens.logprob[i] - tokens.reference[i];
          const bool own = tokens.staleness[i] == 0 && !moved, rejected = rho < 0.8 || rho > 1.2;
          const double A = tokens.advantage[i];
          const bool clipped = (A > 0 && r > 1.2) || (A < 0 && (r < 0.9 || r > 1.3));
          const double values[LEEWAY_HEALTH] = {1, terms.loss[i], std::fabs(d), ratio(-d), ratio(-d) * ratio(-d),
                                                double(own), own * std::fabs(d), double(clipped), rejected ? 0 : rho,
                                                double(rejected), k * k / 2, tokens.entropy[i], d, d * d / 2,
                                                std::exp(-clamp(d, -20, 20)) - 1 + clamp(d, -20, 20)};
          for (int j = 0; j < LEEWAY_HEALTH; ++j) sums[j] += values[j];
          sums[LEEWAY_HEALTH + std::min(tokens.staleness[i], kBins - 1)] += 1;
        }
        for (int j = 0; j < LEEWAY_HEALTH + kBins; ++j) {
          const double sum = terms.health[s * (LEEWAY_HEALTH + kBins) + j];
          const double tolerance = 1e-9 * std::fmax(1, std::fabs(sums[j]));
          REQUIRE(std::fabs(sum - sums[j]) <= tolerance, "sequence %d, sum %d: %g, not %g", s, j, sum, sums[j]);
        }
      }
    }
  }
}

CHECK(terms_are_the_same_bits_however_they_are_computed) {
  Random random(26);
  for (Device device : devices()) {
    TokensOf<float> tokens(random, {40, 3, 0, 17, 1});
    const LeewayRecipe recipe = driver::recipe(LEEWAY_GSPO, LEEWAY_SEQUENCE, LEEWAY_K3, true, false, 0.02);
    const TermsOf<float> once = terms(device, recipe, tokens, true, false);
    REQUIRE(once.same_bits(terms(device, recipe, tokens, true, false)), "twice on device %d", int(device));
    if (device != Device::cpu) continue;
    TermsOf<float> parts(tokens.size, 5);
    const LeewayTokens view = tokens.view(true, false);
    const LeewayTerms out = parts.view();
    const int64_t ranges[][2] = {{3, 5}, {0, 1}, {1, 3}};
    for (const auto& [begin, end] : ranges) {
      leeway_token_terms_cpu(&view, &recipe, tokens.logprob.data(), tokens.entropy.data(), &out, begin, end);
    }
    REQUIRE(once.same_bits(parts), "in ranges");
  }
}

// So long that a thread has many tokens, and that a block has more threads.
CHECK(long_sequences_on_cuda_are_those_of_the_cpu) {
  Random random(29);
  if (devices().back() != Device::cuda) return;
  for (const auto& lengths : {std::vector<int32_t>{700, 0, 3}, std::vector<int32_t>{3000, 1500}}) {
    TokensOf<double> tokens(random, lengths);
    for (int64_t i = 0; i < tokens.size; ++i) tokens.proximal[i] = tokens.logprob[i] + random.uniform(-0.05, 0.06);
    const LeewayRecipe recipe = driver::recipe(LEEWAY_GSPO, LEEWAY_SEQUENCE_MASK, LEEWAY_K3, false, true, 0.02);
    const TermsOf<double> cpu = terms(Device::cpu, recipe, tokens, true, false);
    const TermsOf<double> cuda = terms(Device::cuda, recipe, tokens, true, false);
    const auto near = [](const auto& a, const auto& b) {
      for (size_t i = 0; i < a.size(); ++i) {
        if (!(std::fabs(a[i] - b[i]) <= 1e-9 * std::fmax(1, std::fabs(b[i])))) return false;
      }
      return true;
    };
    REQUIRE(near(cuda.loss, cpu.loss) && near(cuda.ratio, cpu.ratio), "%d tokens", lengths[0]);
    REQUIRE(near(cuda.coefficient, cpu.coefficient), "%d tokens", lengths[0]);
    REQUIRE(near(cuda.health, cpu.health), "%d tokens", lengths[0]);
  }
}

CHECK(terms_that_nobody_wants_are_not_written) {
  Random random(27);
  TokensOf<float> tokens(random, {10});
  LeewayRecipe recipe = driver::recipe(LEEWAY_PPO_CLIP, LEEWAY_TIS, LEEWAY_NO_KL, false, false, 0);
  recipe.num_bins = 0;
  LeewayTokens view = tokens.view(false, false);
  view.reference = nullptr;
  view.staleness = nullptr;
  for (Device device : devices()) {
    TermsOf<float> whole = terms(device, recipe, tokens, false, false), part(10, 1);
    LeewayTerms out{};
    out.coefficient = part.coefficient.data();
    out.health = part.health.data();
    if (device == Device::cpu) {
      leeway_token_terms_cpu(&view, &recipe, tokens.logprob.data(), nullptr, &out, 0, 1);
    } else {
      finish(leeway_token_terms_cuda(&view, &recipe, tokens.logprob.data(), nullptr, &out, nullptr));
    }
    REQUIRE(part.coefficient.same_bits(whole.coefficient), "device %d", int(device));
    REQUIRE(part.health[5] == 0 && part.health[6] == 0 && part.health[11] == 0, "staleness and entropy unknown");
    REQUIRE(std::isnan(part.health[LEEWAY_HEALTH]), "a histogram without bins");
  }
}

// A row's three stages at once are what they are one after the other.
template <typename X, typename G>
void compare_fused() {
  typedef typename RowsOf<X, G>::T T;
  Random random(28);
  for_every_recipe([&](const LeewayRecipe& recipe, const std::vector<Device>& devices) {
    const bool sequence_level = recipe.surrogate >= LEEWAY_GSPO || recipe.correction >= LEEWAY_SEQUENCE;
    if (sequence_level || recipe.divergence_args[1] == 1) return;
    RowsOf<X, G> rows(random, 4, 1 + random.below(1300), random.below(2));
    TokensOf<T> tokens(random, {4});
    for (int64_t i = 0; i < 4; ++i) {
      if (tokens.mask[i] == 0) rows.set(i, rows.vocab / 2, kNone);  // not to be read
    }
    const LeewayTokens view = tokens.view(true, false);
    const Name name(recipe, true, sizeof(X));
    for (Device device : devices) {
      rows.poison();
      stats(device, rows.view());
      for (int64_t i = 0; i < 4; ++i) {
        if (tokens.mask[i] == 0) continue;
        tokens.proximal[i] = rows.logprob[i] + T(random.uniform(-0.4, 0.4));
        tokens.behaviour[i] = tokens.reference[i] = tokens.proximal[i] + T(random.uniform(-0.4, 0.4));
      }
      TermsOf<T> terms(4, 1);
      const LeewayTerms out = terms.view();
      if (device == Device::cpu) {
        leeway_token_terms_cpu(&view, &recipe, rows.logprob.data(), rows.entropy.data(), &out, 0, 1);
      } else {
        finish(leeway_token_terms_cuda(&view, &recipe, rows.logprob.data(), rows.entropy.data(), &out, nullptr));
      }
      LeewayRows slopes = rows.view();
      slopes.slope_logprob = terms.coefficient.data();
      slopes.slope_entropy = terms.slope_entropy.data();
      grads(device, slopes);
      const auto logprob = rows.logprob, entropy = rows.entropy, lse = rows.lse;
      const auto grad = rows.grad;

      rows.poison();
      const LeewayRows fused = rows.view();
      if (device == Device::cpu) {
        leeway_row_loss_cpu(&fused, &view, &recipe, 0, 1);
        leeway_row_loss_cpu(&fused, &view, &recipe, 1, 4);
      } else {
        finish(leeway_row_loss_cuda(&fused, &view, &recipe, nullptr));
      }
      const bool exact = device == Device::cpu;
      const auto same = [&](double value, double staged, double tolerance) {
        return value == staged || (!exact && std::fabs(value - staged) <= tolerance);
      };
      for (int64_t i = 0; i < 4; ++i) {
        const bool masked = tokens.mask[i] == 0;
        REQUIRE(same(rows.logprob[i], masked ? 0 : logprob[i], 1e-5), "%s", name.text);
        REQUIRE(same(rows.entropy[i], masked ? 0 : entropy[i], 1e-5), "%s", name.text);
        REQUIRE(same(rows.lse[i], masked ? 0 : lse[i], 1e-5), "%s", name.text);
        for (int64_t j = 0; j < rows.vocab; ++j) {
          const double staged = get(grad[&rows.grad_at(i, j) - rows.grad.data()]);
          const double tolerance = 2 * number(G{}).spacing * std::fabs(staged) + 1e-4;
          REQUIRE(same(get(rows.grad_at(i, j)), staged, tolerance), "%s", name.text);
        }
      }
      if (device == Device::cpu || sizeof(G) > sizeof(X)) continue;
      const LeewayRows overlaid = rows.overlaid();
      finish(leeway_row_loss_cuda(&overlaid, &view, &recipe, nullptr));
      REQUIRE(rows.overlay_is(rows.grad), "%s", name.text);
    }
  });
}

CHECK(rows_at_once_are_their_stages) {
  compare_fused<double, double>();
  compare_fused<float, float>();
  compare_fused<float, Bf16>();
  compare_fused<Bf16, Bf16>();
  compare_fused<F16, float>();
}

}  // namespace driver

// What the operators of the token loss are given: checked, and named where it is wrong.
#include <ATen/ops/arange.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "loss.h"

namespace leeway::bind {

namespace {

struct Known {
  c10::string_view name;
  int32_t kind;
  size_t num_args;
};

// The functions of engine/algorithms that have a kernel, and how many keyword arguments each of them has.
constexpr Known SURROGATES[] = {
    {"reinforce", LEEWAY_REINFORCE, 0}, {"importance", LEEWAY_IMPORTANCE, 0}, {"ppo_clip", LEEWAY_PPO_CLIP, 3},
    {"cispo", LEEWAY_CISPO, 2},         {"icepop", LEEWAY_ICEPOP, 2},         {"dppo", LEEWAY_DPPO, 2},
    {"sapo", LEEWAY_SAPO, 2},           {"gspo", LEEWAY_GSPO, 2},             {"gspo_token", LEEWAY_GSPO_TOKEN, 2},
};
constexpr Known CORRECTIONS[] = {
    {"none", LEEWAY_UNCORRECTED, 0},     {"decoupled", LEEWAY_DECOUPLED, 0},
    {"tis", LEEWAY_TIS, 1},              {"icepop", LEEWAY_ICEPOP_WEIGHT, 2},
    {"sequence", LEEWAY_SEQUENCE, 2},    {"sequence_mask", LEEWAY_SEQUENCE_MASK, 3},
};
constexpr Known DIVERGENCES[] = {
    {"none", LEEWAY_NO_KL, 0}, {"k1", LEEWAY_K1, 2}, {"k2", LEEWAY_K2, 2}, {"k3", LEEWAY_K3, 2}};

// The kind of the function that `given` names, its arguments copied to `args`.
template <size_t size, size_t num_args>
int32_t find(const char* slot, const Slot& given, const Known (&table)[size], double (&args)[num_args]) {
  std::ostringstream names;
  for (const Known& known : table) {
    names << (&known == table ? "" : ", ") << known.name;
    if (known.name != given.name) continue;
    TORCH_CHECK_VALUE(given.args.size() == known.num_args, slot, "_args: ", known.name, " takes ", known.num_args,
                      ", not ", given.args.size());
    std::copy(given.args.begin(), given.args.end(), args);
    return known.kind;
  }
  TORCH_CHECK_VALUE(false, slot, ": '", given.name, "' has no kernel; these have: ", names.str());
}

// Whether `cu` [S + 1] rises from 0 to n, as a tensor: asking would wait for the device.
Tensor is_rising(const Tensor& cu, int64_t n) {
  const int64_t last = cu.size(0) - 1;
  const Tensor steps = cu.narrow(0, 1, last).ge(cu.narrow(0, 0, last)).all();
  return steps.logical_and(cu.select(0, 0).eq(0)).logical_and(cu.select(0, last).eq(n));
}

}  // namespace

Tensor vector(const Tensor& given, const char* name, const Expected& expected, at::ScalarType type) {
  TORCH_CHECK_VALUE(given.dim() == 1 && given.size(0) == expected.size, name, ": has shape ", given.sizes(),
                    " where [", expected.size, "] is needed");
  TORCH_CHECK_VALUE(given.device() == expected.device, name, ": is on ", given.device(), ", other arguments on ",
                    expected.device);
  TORCH_CHECK_VALUE(given.scalar_type() == type, name, ": is of type ", given.scalar_type(), " where ", type,
                    " is needed");
  return given.contiguous();
}

MaybeTensor vector(const MaybeTensor& given, const char* name, const Expected& expected, at::ScalarType type) {
  return given ? MaybeTensor(vector(*given, name, expected, type)) : std::nullopt;
}

Tensor targets(const Tensor& given, const Expected& expected, int64_t vocab) {
  const Tensor result = vector(given, "targets", expected, at::kLong);
  if (!result.is_cpu()) return result;
  const int64_t* values = result.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < expected.size; ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < vocab, "targets: value ", values[i], " at row ", i,
                      " is not in vocab 0..", vocab - 1);
  }
  return result;
}

void check_temperature(double temperature) {
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "temperature: must be above 0, not ", temperature);
}

void check_matrix(const Tensor& given, const char* name) {
  TORCH_CHECK_VALUE(given.dim() == 2, name, ": has ", given.dim(), " dimensions where 2 are needed");
  TORCH_CHECK_VALUE(at::isFloatingType(given.scalar_type()) && given.element_size() >= 2, name, ": is of type ",
                    given.scalar_type(), " where float64, float32, bfloat16 or float16 is needed");
  TORCH_CHECK_VALUE(given.size(1) > 0, name, ": has rows of no elements");
}

Tokens tokens(Tokens given, const Expected& expected, at::ScalarType type) {
  const int64_t n = expected.size;
  Tensor cu = given.cu_seqlens;
  TORCH_CHECK_VALUE(cu.dim() == 1 && cu.size(0) >= 1, "cu_seqlens: has shape ", cu.sizes(), " where [S + 1] is needed");
  cu = vector(cu, "cu_seqlens", {cu.size(0), expected.device}, at::kInt);
  Tensor omega = vector(given.omega, "omega", expected, type);
  const Tensor rising = is_rising(cu, n);
  if (cu.is_cpu()) {
    TORCH_CHECK_VALUE(rising.item<bool>(), "cu_seqlens: must rise from 0 to ", n, ", the number of tokens");
  } else {  // one sequence and a loss that is not a number, rather than a wait or a wild read
    const Tensor one = at::arange(cu.size(0), cu.options()).clamp_max(1).mul(n);
    cu = at::where(rising, cu, one);
    omega = at::where(rising, omega, at::full_like(omega, std::numeric_limits<double>::quiet_NaN()));
  }
  return {cu,
          vector(given.behaviour, "behaviour", expected, type),
          vector(given.advantage, "advantage", expected, type),
          vector(given.mask, "mask", expected, type),
          omega,
          vector(given.proximal, "proximal", expected, type),
          vector(given.reference, "reference", expected, type),
          vector(given.staleness, "staleness", expected, at::kInt),
          given.moved};
}

LeewayRecipe recipe(const Slot& surrogate, const Slot& correction, const Slot& divergence, double entropy_coefficient,
                    int64_t num_bins) {
  LeewayRecipe recipe{};
  recipe.surrogate = find("surrogate", surrogate, SURROGATES, recipe.surrogate_args);
  recipe.correction = find("correction", correction, CORRECTIONS, recipe.correction_args);
  recipe.divergence = find("divergence", divergence, DIVERGENCES, recipe.divergence_args);
  TORCH_CHECK_VALUE(std::isfinite(entropy_coefficient), "entropy_coefficient: must be a number, not ",
                    entropy_coefficient);
  TORCH_CHECK_VALUE(num_bins > 0 && num_bins <= 4096, "num_bins: must be from 1 to 4096, not ", num_bins);
  recipe.entropy_coefficient = entropy_coefficient;
  recipe.num_bins = static_cast<int32_t>(num_bins);
  return recipe;
}

std::vector<std::string> slot_names(c10::string_view slot) {
  const auto names = [](const auto& table) {
    std::vector<std::string> result;
    for (const Known& known : table) result.emplace_back(known.name);
    return result;
  };
  if (slot == "surrogate") return names(SURROGATES);
  if (slot == "correction") return names(CORRECTIONS);
  TORCH_CHECK_VALUE(slot == "divergence", "slot: '", slot, "' is none of surrogate, correction, divergence");
  return names(DIVERGENCES);
}

void check_recipe(const LeewayRecipe& recipe, const Tokens& tokens) {
  TORCH_CHECK_VALUE(recipe.divergence == LEEWAY_NO_KL || tokens.reference, "reference: the divergence needs it");
}

}  // namespace leeway::bind

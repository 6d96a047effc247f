#include "planner.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace leeway {
namespace {

using Bins = std::vector<int32_t>;  // the bin of each unit

template <typename T>
std::vector<int32_t> descending(std::span<const T> key) {
  std::vector<int32_t> order(key.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return key[a] > key[b]; });
  return order;
}

void check(std::span<const int64_t> cost, std::span<const double> work, int64_t budget, int32_t ranks) {
  if (ranks < 1) throw std::invalid_argument("ranks = " + std::to_string(ranks) + ": must be 1 or greater");
  if (cost.size() != work.size()) {
    throw std::invalid_argument(std::to_string(cost.size()) + " costs but " + std::to_string(work.size()) + " works");
  }
  for (size_t i = 0; i < cost.size(); ++i) {
    if (cost[i] < 0 || cost[i] > budget) {
      throw std::invalid_argument("unit " + std::to_string(i) + " costs " + std::to_string(cost[i]) +
                                  " tokens: must lie between 0 and the budget of " + std::to_string(budget));
    }
  }
}

// Each unit, largest first, into the fullest bin that holds it. A bin without room for the smallest unit is closed.
std::pair<Bins, int32_t> best_fit(std::span<const int64_t> cost, int64_t budget) {
  Bins bin(cost.size());
  int32_t opened = 0;
  const int64_t smallest = cost.empty() ? 0 : *std::min_element(cost.begin(), cost.end());
  std::set<std::pair<int64_t, int32_t>> open;  // room, bin
  for (int32_t unit : descending(cost)) {
    auto found = open.lower_bound({cost[unit], 0});
    int64_t room = budget;
    if (found == open.end()) {
      bin[unit] = opened++;
    } else {
      room = found->first;
      bin[unit] = found->second;
      open.erase(found);
    }
    room -= cost[unit];
    if (room >= smallest) open.emplace(room, bin[unit]);
  }
  return {bin, opened};
}

constexpr int kPatience = 8192;  // about a millisecond

// Each unit, heaviest first, into the bin of the least work that has room. False where a unit finds none, or where
// `kPatience` lighter bins in all had to be passed over for want of room: the bins are too full to be levelled.
bool level(std::span<const int64_t> cost, std::span<const double> work, int64_t budget, int32_t num_bins, Bins& bin) {
  using Load = std::pair<double, int32_t>;  // work, bin
  std::priority_queue<Load, std::vector<Load>, std::greater<>> lightest;
  for (int32_t b = 0; b < num_bins; ++b) lightest.emplace(0.0, b);
  const int64_t smallest = cost.empty() ? 0 : *std::min_element(cost.begin(), cost.end());
  std::vector<int64_t> room(num_bins, budget);
  std::vector<Load> passed;
  int patience = kPatience;
  for (int32_t unit : descending(work)) {
    passed.clear();
    while (!lightest.empty() && room[lightest.top().second] < cost[unit] && patience-- > 0) {
      passed.push_back(lightest.top());
      lightest.pop();
    }
    if (lightest.empty() || patience < 0) return false;
    const auto [load, chosen] = lightest.top();
    lightest.pop();
    bin[unit] = chosen;
    room[chosen] -= cost[unit];
    passed.emplace_back(load + work[unit], chosen);
    for (const Load& each : passed) {
      if (room[each.second] >= smallest) lightest.push(each);
    }
  }
  return true;
}

}  // namespace

Plan plan(std::span<const int64_t> cost, std::span<const double> work, int64_t budget, int32_t ranks) {
  check(cost, work, budget, ranks);
  auto [packed, opened] = best_fit(cost, budget);
  const int32_t num_micro = std::max(1, (opened + ranks - 1) / ranks);
  const int32_t num_bins = num_micro * ranks;
  Bins bin(cost.size());
  if (!level(cost, work, budget, num_bins, bin)) bin = packed;

  std::vector<double> load(num_bins, 0.0);
  for (size_t unit = 0; unit < bin.size(); ++unit) load[bin[unit]] += work[unit];
  std::vector<int32_t> place(num_bins);  // of each bin among the bins by descending work
  const auto order = descending(std::span<const double>(load));
  for (int32_t i = 0; i < num_bins; ++i) place[order[i]] = i;

  Plan result{num_micro, Bins(bin.size()), Bins(bin.size())};
  for (size_t unit = 0; unit < bin.size(); ++unit) {
    const int32_t round = place[bin[unit]] / ranks;
    const int32_t seat = place[bin[unit]] % ranks;
    result.micro[unit] = round;
    result.rank[unit] = round % 2 == 0 ? seat : ranks - 1 - seat;
  }
  return result;
}

}  // namespace leeway

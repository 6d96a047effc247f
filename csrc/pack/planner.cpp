#include "planner.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace leeway {
namespace {

using Bins = std::vector<int32_t>;  // the bin of each unit
using Order = std::vector<int32_t>;
constexpr int32_t kNone = -1;

constexpr int32_t kMostRanks = 1 << 20;
constexpr double kTolerance = 1e-3;     // of the work of a bin
constexpr double kGain = 0.75;          // an exchange leaves less than this share of two bins' difference
constexpr size_t kPartners = 16;        // light bins that a heavy one turns to
constexpr int64_t kPatience = 1 << 17;  // units looked at while bins are refined;
constexpr int64_t kPair = 16;           // a pair of bins counts as so many more

void check(std::span<const int64_t> cost, std::span<const double> work, int64_t budget, int32_t ranks) {
  if (ranks < 1 || ranks > kMostRanks) {
    throw std::invalid_argument("ranks = " + std::to_string(ranks) + ": must lie between 1 and " +
                                std::to_string(kMostRanks));
  }
  if (cost.size() != work.size()) {
    throw std::invalid_argument(std::to_string(cost.size()) + " costs but " + std::to_string(work.size()) + " works");
  }
  for (size_t i = 0; i < cost.size(); ++i) {
    if (cost[i] < 0 || cost[i] > budget) {
      throw std::invalid_argument("unit " + std::to_string(i) + " costs " + std::to_string(cost[i]) +
                                  " tokens: must lie between 0 and the budget of " + std::to_string(budget));
    }
    if (!(work[i] >= 0) || std::isinf(work[i])) {
      throw std::invalid_argument("unit " + std::to_string(i) + " has work " + std::to_string(work[i]) +
                                  ": must be finite and not negative");
    }
  }
}

// Stable radix sort of `order` by the keys of its entries, descending; the bits of numbers >= 0 order as they do.
template <typename T>
void sort_descending(Order& order, std::span<const T> key) {
  struct Entry {
    uint64_t bits;
    int32_t index;
  };
  std::vector<Entry> entries(order.size()), sorted(order.size());
  uint64_t ever = 0, always = ~uint64_t{0};
  for (size_t i = 0; i < order.size(); ++i) {
    const auto bits = std::bit_cast<uint64_t>(key[order[i]] + T(0));  // -0.0 + 0.0 is 0.0
    entries[i] = {bits, order[i]};
    ever |= bits, always &= bits;
  }
  for (int shift = 0; shift < 64; shift += 8) {
    if (((ever ^ always) >> shift & 255) == 0) continue;
    const auto digit = [&](const Entry& entry) { return 255 - (entry.bits >> shift & 255); };
    std::array<int32_t, 257> place{};
    for (const Entry& entry : entries) ++place[digit(entry) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (const Entry& entry : entries) sorted[place[digit(entry)]++] = entry;
    entries.swap(sorted);
  }
  for (size_t i = 0; i < order.size(); ++i) order[i] = entries[i].index;
}

Order indices(size_t num) {
  Order order(num);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// Units by descending cost, equal ones by work, and by descending work: two sorts fewer where work rises with cost.
std::pair<Order, Order> orders(std::span<const int64_t> cost, std::span<const double> work) {
  Order by_cost = indices(cost.size());
  sort_descending(by_cost, cost);
  if (std::is_sorted(by_cost.begin(), by_cost.end(), [&](int32_t a, int32_t b) { return work[a] > work[b]; })) {
    return {by_cost, by_cost};
  }
  Order by_work = indices(cost.size());
  sort_descending(by_work, work);
  by_cost = by_work;
  sort_descending(by_cost, cost);
  return {by_cost, by_work};
}

// A number for each bin, and a tournament among them, four to a round.
template <typename T>
class Tournament {
 public:
  static constexpr T kOut = std::numeric_limits<T>::lowest();

  explicit Tournament(const std::vector<T>& values) {
    size_t num_leaves = 1;
    for (; num_leaves < values.size(); num_leaves *= 4) leaves_at_ += num_leaves;
    greatest_.assign(leaves_at_ + num_leaves, kOut);
    std::copy(values.begin(), values.end(), greatest_.begin() + leaves_at_);
    for (size_t node = leaves_at_; node-- > 0;) greatest_[node] = greatest_of_children(node);
  }

  T greatest() const { return greatest_[0]; }
  int32_t winner() const { return first(greatest()); }
  T operator[](int32_t bin) const { return greatest_[leaves_at_ + bin]; }

  // The first bin of at least `least`; there must be one.
  int32_t first(T least) const {
    size_t node = 0;
    while (node < leaves_at_) {
      const T* child = &greatest_[4 * node + 1];
      const bool second = child[0] < least, third = second & (child[1] < least), fourth = third & (child[2] < least);
      node = 4 * node + 1 + second + third + fourth;
    }
    return static_cast<int32_t>(node - leaves_at_);
  }

  void set(int32_t bin, T value) {
    size_t node = leaves_at_ + bin;
    greatest_[node] = value;
    while (node > 0) {
      node = (node - 1) / 4;
      value = greatest_of_children(node);
      if (greatest_[node] == value) return;
      greatest_[node] = value;
    }
  }

 private:
  T greatest_of_children(size_t node) const {
    const T* child = &greatest_[4 * node + 1];
    return std::max(std::max(child[0], child[1]), std::max(child[2], child[3]));
  }

  size_t leaves_at_ = 0;
  std::vector<T> greatest_;  // of each node's subtree: the root's, then level by level
};

// First fit opens no more: all but one of its bins are filled by half at least.
size_t most_bins(std::span<const int64_t> cost, int64_t budget) {
  const double filled = std::accumulate(cost.begin(), cost.end(), 0.0) / std::max<double>(1.0, budget);
  return std::min(cost.size(), static_cast<size_t>(2 * filled) + 2);
}

// Each unit into the first bin that has room, and the number of bins that took one.
std::pair<Bins, int32_t> first_fit(const Order& order, std::span<const int64_t> cost, int64_t budget) {
  Bins bin(cost.size());
  int32_t opened = 0;
  std::vector<int64_t> rooms(most_bins(cost, budget), budget);
  auto unit = order.begin();
  for (; unit != order.end() && cost[*unit] > budget - cost[*unit]; ++unit) {  // no two of these fit into one
    bin[*unit] = opened;
    rooms[opened++] -= cost[*unit];
  }
  Tournament<int64_t> room(rooms);
  for (; unit != order.end(); ++unit) {
    const int32_t b = bin[*unit] = room.first(cost[*unit]);
    room.set(b, room[b] - cost[*unit]);
    opened = std::max(opened, b + 1);
  }
  return {bin, opened};
}

// Each unit into the bin of the least work that has room; false where one finds none.
//
// Costs fall along `order`, so a bin that has no room for a unit sleeps until the first that it holds: it wakes at most
// once for each unit that it takes.
bool level(const Order& order, std::span<const int64_t> cost, std::span<const double> work, int64_t budget,
           int32_t num_bins, Bins& bin) {
  std::vector<int64_t> room(num_bins, budget);
  std::vector<double> lightness(num_bins, 0.0);  // -load
  const auto put = [&](int32_t unit, int32_t b) {
    bin[unit] = b;
    room[b] -= cost[unit];
    lightness[b] -= work[unit];
  };
  auto unit = order.begin();
  for (int32_t b = 0; b < num_bins && unit != order.end(); ++b) put(*unit++, b);
  Tournament<double> lightest(lightness);
  std::vector<int32_t> wakes(order.size(), kNone), wakes_too(num_bins, kNone);  // lists of bins, by place in `order`
  for (; unit != order.end(); ++unit) {
    for (int32_t b = wakes[unit - order.begin()]; b != kNone; b = wakes_too[b]) lightest.set(b, lightness[b]);
    int32_t b;
    while (room[b = lightest.winner()] < cost[*unit]) {
      if (lightest.greatest() == lightest.kOut) return false;
      lightest.set(b, lightest.kOut);
      const auto held = std::partition_point(unit, order.end(), [&](int32_t u) { return cost[u] > room[b]; });
      if (held != order.end()) wakes_too[b] = std::exchange(wakes[held - order.begin()], b);
    }
    put(*unit, b);
    lightest.set(b, lightness[b]);
  }
  return true;
}

// Bins whose units move: each holds a list of them, by descending work.
class Refinement {
 public:
  Refinement(const Order& by_work, std::span<const int64_t> cost, std::span<const double> work, int64_t budget,
             int32_t num_bins, Bins& bin)
      : cost_(cost), work_(work), bin_(bin), bins_(num_bins, Bin{0.0, budget, 0, kNone}), next_(bin.size()),
        heaviest_({}), lightest_({}) {
    for (auto unit = by_work.rbegin(); unit != by_work.rend(); ++unit) add(*unit, bin[*unit]);
    std::vector<double> load(num_bins);
    std::transform(bins_.begin(), bins_.end(), load.begin(), [](const Bin& b) { return b.load; });
    heaviest_ = Tournament<double>(load);
    std::transform(load.begin(), load.end(), load.begin(), std::negate<>());
    lightest_ = Tournament<double>(load);
  }

  void run() {
    double total = 0.0;
    for (const Bin& bin : bins_) total += bin.load;
    for (size_t num_left = bins_.size(); num_left > 0;) {
      const int32_t heavy = heaviest_.winner();
      if (bins_[heavy].load <= total / static_cast<double>(num_left) * (1 + kTolerance)) return;
      if (relieve(heavy)) continue;
      if (patience_ < 0) return;
      heaviest_.set(heavy, heaviest_.kOut);
      lightest_.set(heavy, lightest_.kOut);
      total -= bins_[heavy].load;
      --num_left;
    }
  }

 private:
  struct Bin {
    double load;
    int64_t room;
    int32_t num_units, first;
  };
  struct Exchange {
    int32_t given = kNone, taken = kNone;
  };

  double work(int32_t unit) const { return unit == kNone ? 0 : work_[unit]; }
  int64_t cost(int32_t unit) const { return unit == kNone ? 0 : cost_[unit]; }

  void rank(int32_t b) {
    heaviest_.set(b, bins_[b].load);
    lightest_.set(b, -bins_[b].load);
  }

  bool relieve(int32_t heavy) {
    if (bins_[heavy].num_units < 2) return false;  // a single unit weighs more than any exchange could save
    std::vector<int32_t> tried;
    Exchange best;
    while (best.given == kNone && tried.size() < kPartners && lightest_.winner() != heavy && patience_ >= 0) {
      const int32_t light = tried.emplace_back(lightest_.winner());
      lightest_.set(light, lightest_.kOut);
      patience_ -= kPair + bins_[heavy].num_units + bins_[light].num_units;
      best = best_exchange(bins_[heavy], bins_[light]);
    }
    if (best.given != kNone) {
      move(best.given, tried.back());
      if (best.taken != kNone) move(best.taken, heavy);
      rank(heavy);
    }
    for (int32_t b : tried) rank(b);
    return best.given != kNone;
  }

  // The units whose exchange brings two bins' loads closest to each other: for each one given, that of the light bin
  // just above or just below what would make them equal, or none.
  Exchange best_exchange(const Bin& heavy, const Bin& light) const {
    const double half = (heavy.load - light.load) / 2;
    double least = half * kGain;  // the distance from equality
    Exchange best;
    int32_t above = kNone, below = light.first;
    for (int32_t given = heavy.first; given != kNone; given = next_[given]) {
      const double wanted = work_[given] - half;
      for (; below != kNone && work_[below] > wanted; below = next_[below]) above = below;
      for (int32_t taken : {above, below}) {
        const double distance = std::abs(work_[given] - work(taken) - half);
        const int64_t moved = cost_[given] - cost(taken);
        if (distance < least && moved <= light.room && -moved <= heavy.room) {
          least = distance;
          best = {given, taken};
        }
      }
    }
    return best;
  }

  void add(int32_t unit, int32_t b) {
    int32_t* link = &bins_[b].first;
    while (*link != kNone && work_[*link] > work_[unit]) link = &next_[*link];
    next_[unit] = std::exchange(*link, unit);
    count(unit, b, 1);
    bin_[unit] = b;
  }

  void move(int32_t unit, int32_t to) {
    int32_t* link = &bins_[bin_[unit]].first;
    while (*link != unit) link = &next_[*link];
    *link = next_[unit];
    count(unit, bin_[unit], -1);
    add(unit, to);
  }

  void count(int32_t unit, int32_t b, int sign) {
    bins_[b].load += sign * work_[unit];
    bins_[b].room -= sign * cost_[unit];
    bins_[b].num_units += sign;
  }

  std::span<const int64_t> cost_;
  std::span<const double> work_;
  Bins& bin_;
  std::vector<Bin> bins_;
  std::vector<int32_t> next_;                  // after each unit in its bin
  Tournament<double> heaviest_, lightest_;     // load, -load
  int64_t patience_ = kPatience;
};

// Micro-batch and rank of each unit: bins by descending work, in rounds of alternating direction.
Plan deal(const Bins& bin, std::span<const double> work, int32_t num_micro, int32_t ranks) {
  std::vector<double> load(static_cast<size_t>(num_micro) * ranks, 0.0);
  for (size_t unit = 0; unit < bin.size(); ++unit) load[bin[unit]] += work[unit];
  Order order = indices(load.size());
  sort_descending<double>(order, load);
  std::vector<int32_t> place(load.size());
  for (size_t i = 0; i < order.size(); ++i) place[order[i]] = static_cast<int32_t>(i);

  Plan result{num_micro, Bins(bin.size()), Bins(bin.size())};
  for (size_t unit = 0; unit < bin.size(); ++unit) {
    const int32_t round = place[bin[unit]] / ranks;
    const int32_t seat = place[bin[unit]] % ranks;
    result.micro[unit] = round;
    result.rank[unit] = round % 2 == 0 ? seat : ranks - 1 - seat;
  }
  return result;
}

}  // namespace

Plan plan(std::span<const int64_t> cost, std::span<const double> work, int64_t budget, int32_t ranks) {
  check(cost, work, budget, ranks);
  const auto [by_cost, by_work] = orders(cost, work);
  const auto [packed, opened] = first_fit(by_cost, cost, budget);
  const int32_t num_micro = std::max(1, (opened + ranks - 1) / ranks);
  const int32_t num_bins = num_micro * ranks;
  Bins bin(cost.size());
  if (!level(by_cost, cost, work, budget, num_bins, bin)) bin = packed;
  Refinement(by_work, cost, work, budget, num_bins, bin).run();
  return deal(bin, work, num_micro, ranks);
}

}  // namespace leeway

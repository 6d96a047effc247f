// Units of work into micro-batches: bins of bounded token count, equally many on every rank, balanced in work.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace leeway {

struct Plan {
  int32_t num_micro;           // micro-batches on each rank; at least 1
  std::vector<int32_t> rank;   // of each unit
  std::vector<int32_t> micro;  // of each unit, 0 .. num_micro - 1
};

// `cost` [n] is each unit's tokens, `work` [n] its expected time in any unit, `budget` the tokens of a micro-batch.
//
// 1. First-fit decreasing by cost gives a number of bins (at most 11/9 of the least + 6/9), rounded up to a multiple
//    of `ranks`. No more micro-batches are used than that: each costs its rank a pass over the weights.
// 2. The work is levelled over those bins: each unit, in the same order, goes to the bin of the least work that has
//    room. Where a unit finds none, the packing of step 1 stands.
// 3. The heaviest bin gives a unit to one of the lightest, or exchanges one with it, within the budget, until none
//    is 0.1% above the mean. A bin that cannot be made lighter is left out, and the others are levelled among
//    themselves. A bound on the units looked at keeps this to about a millisecond.
// 4. Bins, heaviest first, are dealt to the ranks in rounds, the direction alternating: ranks that meet at a
//    micro-batch hold nearly equal work there, and in all.
//
// No plan has all bins below L = max(mean work of the bins, work of the heaviest unit). This one's heaviest bin stays
// within 1% of L where there are several units to a bin and the budget leaves room to exchange them: up to about nine
// tenths of it used. Fuller bins can be as much as some tens of percent apart, on one and the same rank mostly:
// those that meet stay close by step 4.
//
// Deterministic: ties go to the lower index. O(n log n). Throws std::invalid_argument, naming the unit, for a cost
// that is negative or above the budget and for work that is negative or not finite.
Plan plan(std::span<const int64_t> cost, std::span<const double> work, int64_t budget, int32_t ranks);

}  // namespace leeway

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
// 1. Best-fit decreasing by cost gives a number of bins (at most 11/9 of the least + 6/9), rounded up to a multiple
//    of `ranks`. No more micro-batches are used than that: each costs its rank a pass over the weights.
// 2. Longest processing time first levels the work over those bins: each unit, heaviest first, goes to the bin of the
//    least work that has room. Where the bins are too full for that, the packing of step 1 stands.
// 3. Bins, heaviest first, are dealt to the ranks in rounds, the direction alternating: ranks that meet at a
//    micro-batch hold nearly equal work there, and in all.
//
// Deterministic: ties go to the lower index. O(n log n). Throws std::invalid_argument, naming the
// unit, for a cost that is negative or above the budget.
Plan plan(std::span<const int64_t> cost, std::span<const double> work, int64_t budget, int32_t ranks);

}  // namespace leeway

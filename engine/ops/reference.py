"""The compiled operations in plain Python: slow, short, and what the tests hold the fast ones to."""

from bisect import insort
from collections.abc import Sequence

PATIENCE = 8192  # bins passed over in one plan


def plan(costs: Sequence[int], work: Sequence[float], budget: int, ranks: int) -> tuple[int, list[int], list[int]]:
    """`(num_micro, rank [n], micro [n])` of n units, as csrc/pack/planner.h describes it."""
    packed = _best_fit(costs, budget)
    num_micro = max(1, -(-(max(packed, default=-1) + 1) // ranks))
    num_bins = num_micro * ranks
    bins = _level(costs, work, budget, num_bins) or packed

    load = [0.0] * num_bins
    for unit, chosen in enumerate(bins):
        load[chosen] += work[unit]
    place = {chosen: i for i, chosen in enumerate(_descending(load))}
    seats = [divmod(place[chosen], ranks) for chosen in bins]
    rank = [seat if turn % 2 == 0 else ranks - 1 - seat for turn, seat in seats]
    return num_micro, rank, [turn for turn, _ in seats]


def _descending(keys: Sequence[float]) -> list[int]:
    return sorted(range(len(keys)), key=lambda i: -keys[i])


def _best_fit(costs: Sequence[int], budget: int) -> list[int]:
    """The bin of each unit: largest first, into the fullest bin that holds it."""
    bins, room = [0] * len(costs), list[int]()
    for unit in _descending(costs):
        holding = [(left, b) for b, left in enumerate(room) if left >= costs[unit]]
        if not holding:
            room.append(budget)
        bins[unit] = min(holding)[1] if holding else len(room) - 1
        room[bins[unit]] -= costs[unit]
    return bins


def _level(costs: Sequence[int], work: Sequence[float], budget: int, num_bins: int) -> list[int]:
    """The bin of each unit: heaviest first, into the least work that has room. Empty where the bins are too full."""
    bins, room, patience = [0] * len(costs), [budget] * num_bins, PATIENCE
    lightest = [(0.0, b) for b in range(num_bins)]
    smallest = min(costs, default=0)
    for unit in _descending(work):
        passed = next((i for i, (_, b) in enumerate(lightest) if room[b] >= costs[unit]), PATIENCE + 1)
        patience -= passed
        if patience < 0:
            return []
        load, bins[unit] = lightest.pop(passed)
        room[bins[unit]] -= costs[unit]
        if room[bins[unit]] >= smallest:
            insort(lightest, (load + work[unit], bins[unit]))
    return bins

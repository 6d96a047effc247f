"""The compiled operations in plain Python and torch: slow, short, and what the tests hold the fast ones to."""

from bisect import bisect_left, insort_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

TOLERANCE, GAIN = 1e-3, 0.75  # as in csrc/pack/planner.cpp
PARTNERS, PATIENCE, PAIR = 16, 2**17, 16


def plan(costs: Sequence[int], work: Sequence[float], budget: int, ranks: int) -> tuple[int, list[int], list[int]]:
    """`(num_micro, rank [n], micro [n])` of n units, as csrc/pack/planner.h describes it."""
    by_work = _descending(work)
    by_cost = sorted(by_work, key=lambda unit: -costs[unit])
    packed = _first_fit(by_cost, costs, budget)
    num_micro = max(1, -(-(max(packed, default=-1) + 1) // ranks))
    num_bins = num_micro * ranks
    bins = _level(by_cost, costs, work, budget, num_bins) or packed
    _refine(by_work, costs, work, budget, num_bins, bins)

    load = [0.0] * num_bins
    for unit, chosen in enumerate(bins):
        load[chosen] += work[unit]
    place = {chosen: i for i, chosen in enumerate(_descending(load))}
    seats = [divmod(place[chosen], ranks) for chosen in bins]
    rank = [seat if turn % 2 == 0 else ranks - 1 - seat for turn, seat in seats]
    return num_micro, rank, [turn for turn, _ in seats]


def _descending(keys: Sequence[float]) -> list[int]:
    return sorted(range(len(keys)), key=lambda i: -keys[i])


def _first_fit(order: Sequence[int], costs: Sequence[int], budget: int) -> list[int]:
    """The bin of each unit: the first that has room."""
    bins, room = [0] * len(costs), [budget] * len(costs)
    for unit in order:
        bins[unit] = next(b for b, left in enumerate(room) if left >= costs[unit])
        room[bins[unit]] -= costs[unit]
    return bins


def _level(
    order: Sequence[int], costs: Sequence[int], work: Sequence[float], budget: int, num_bins: int
) -> list[int] | None:
    """The bin of each unit: that of the least work that has room. None where a unit finds none."""
    bins, room, load = [0] * len(costs), [budget] * num_bins, [0.0] * num_bins
    for unit in order:
        roomy = [b for b in range(num_bins) if room[b] >= costs[unit]]
        if not roomy:
            return None
        bins[unit] = chosen = min(roomy, key=lambda b: load[b])
        room[chosen] -= costs[unit]
        load[chosen] += work[unit]
    return bins


def _refine(
    order: Sequence[int], costs: Sequence[int], work: Sequence[float], budget: int, num_bins: int, bins: list[int]
) -> None:
    """Moves units from the heaviest bin to one of the lightest, or exchanges them, until none is above the mean."""
    units: list[list[int]] = [[] for _ in range(num_bins)]  # by descending work
    load, room = [0.0] * num_bins, [budget] * num_bins

    def add(unit: int, chosen: int) -> None:
        insort_left(units[chosen], unit, key=lambda u: -work[u])
        load[chosen] += work[unit]
        room[chosen] -= costs[unit]
        bins[unit] = chosen

    def move(unit: int, chosen: int) -> None:
        units[bins[unit]].remove(unit)
        load[bins[unit]] -= work[unit]
        room[bins[unit]] += costs[unit]
        add(unit, chosen)

    def best_exchange(heavy: int, light: int) -> tuple[int, int | None] | None:
        half = (load[heavy] - load[light]) / 2
        least, best = half * GAIN, None
        for given in units[heavy]:
            others = [None, *units[light], None]
            above = bisect_left(units[light], half - work[given], key=lambda u: -work[u])
            for taken in others[above : above + 2]:
                distance = abs(work[given] - (0 if taken is None else work[taken]) - half)
                moved = costs[given] - (0 if taken is None else costs[taken])
                if distance < least and moved <= room[light] and -moved <= room[heavy]:
                    least, best = distance, (given, taken)
        return best

    for unit in reversed(order):
        add(unit, bins[unit])
    active, total, patience = set(range(num_bins)), 0.0, PATIENCE
    for each in load:  # `sum` rounds in another way
        total += each
    while active:
        heavy = min(active, key=lambda b: (-load[b], b))
        if load[heavy] <= total / len(active) * (1 + TOLERANCE):
            return
        exchange = light = None
        lightest = sorted(active, key=lambda b: (load[b], b))[:PARTNERS]
        for light in lightest[: lightest.index(heavy)] if heavy in lightest else lightest:
            if patience < 0 or len(units[heavy]) < 2:
                break
            patience -= PAIR + len(units[heavy]) + len(units[light])
            exchange = best_exchange(heavy, light)
            if exchange:
                break
        if exchange and light is not None:
            given, taken = exchange
            move(given, light)
            if taken is not None:
                move(taken, heavy)
        elif patience < 0:
            return
        else:
            active.remove(heavy)
            total -= load[heavy]


def pack(streams: Sequence[Tensor], starts: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """See engine.ops.packing, here and below."""
    runs = list(zip(starts.tolist(), _lengths(cu_seqlens), strict=True))
    return [torch.cat([stream[:0], *(stream[start : start + length] for start, length in runs)]) for stream in streams]


def unpack(streams: Sequence[Tensor], starts: Tensor, cu_seqlens: Tensor, size: int, fill: float = 0) -> list[Tensor]:
    loose = [stream.new_full((size,), fill) for stream in streams]
    for to, stream in zip(loose, streams, strict=True):
        for start, part in zip(starts.tolist(), stream.split(_lengths(cu_seqlens)), strict=True):
            to[start : start + len(part)] = part
    return loose


def token_layout(tokens: Tensor, prompt_lengths: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    position_ids, labels, mask, sequence = (tokens.new_zeros(len(tokens)) for _ in range(4))
    for i, (begin, end) in enumerate(_bounds(cu_seqlens)):
        for t in range(begin, end):
            predicts = t + 1 < end and t + 1 - begin >= prompt_lengths[i]
            position_ids[t], sequence[t], mask[t] = t - begin, i, predicts
            labels[t] = tokens[t + 1] if predicts else -100
    return position_ids, labels, mask.float(), sequence


def segment_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    counted = values if mask is None else values * mask
    return torch.stack([part.sum() for part in counted.split(_lengths(cu_seqlens))])


def segment_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    count = segment_sum(torch.ones_like(values), cu_seqlens, mask)
    return segment_sum(values, cu_seqlens, mask) / count.clamp(min=1)


def segment_max(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    counted = values if mask is None else values.masked_fill(mask == 0, -torch.inf)
    lowest = values.new_full((1,), -torch.inf)
    return torch.stack([torch.cat([lowest, part]).amax() for part in counted.split(_lengths(cu_seqlens))])


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    *,
    gamma: float,
    lambda_critic: Tensor,
    lambda_policy: Tensor,
) -> tuple[Tensor, Tensor]:
    def scan(lambdas: Tensor) -> Iterator[Tensor]:
        for i, (begin, end) in enumerate(_bounds(cu_seqlens)):
            following, carry = torch.zeros(()) if bootstrap is None else bootstrap[i], rewards.new_zeros(())
            backwards = []
            for t in reversed(range(begin, end)):
                if mask is None or mask[t]:
                    delta = rewards[t] + gamma * following - values[t]
                    following, carry = values[t], delta + gamma * lambdas[i] * carry
                backwards.append(carry)
            yield from reversed(backwards)

    def column(lambdas: Tensor) -> Tensor:
        return torch.stack([*scan(lambdas), rewards.new_zeros(())])[:-1]

    return column(lambda_policy), column(lambda_critic) + values


def _bounds(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    return pairwise(cu_seqlens.tolist())


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()

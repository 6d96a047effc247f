"""Which domain the next group is drawn from.

Each function takes, for D domains, the `weights` (float64 [D], above 0) and what became of the groups so far, all
float64 [D]: completed `rollouts`, before any filter; groups `trained`, `ended` (trained among them) and `in_flight`. It
returns weights of a draw [D], not necessarily of sum 1.
"""

import numpy as np

from engine.algorithms.slots import Count, FromOne, UpToOne

Array = np.ndarray


def static(weights: Array, rollouts: Array, trained: Array, ended: Array, in_flight: Array) -> Array:
    """The weights themselves."""
    return weights


def adaptive(
    weights: Array,
    rollouts: Array,
    trained: Array,
    ended: Array,
    in_flight: Array,
    *,
    low: UpToOne = 0.1,
    high: FromOne = 10.0,
    after: Count = 50,
) -> Array:
    """w * alpha, alpha = clip(w / (n / N), low, high) for n of N rollouts; `high` where n = 0; w while N < after.

    So that domains whose answers take long come back to their share of completed rollouts. What is lost to filters
    later it does not see. Apriel-Reasoner, arXiv:2604.02007.
    """
    total, share = rollouts.sum(), weights / weights.sum()
    if total < after:
        return share
    alpha = np.full_like(share, high)
    np.divide(share * total, rollouts, out=alpha, where=rollouts > 0)
    return share * alpha.clip(low, high)


def deficit(weights: Array, rollouts: Array, trained: Array, ended: Array, in_flight: Array) -> Array:
    """1 for the domain furthest below its share of trained groups, else 0.

    A group in flight counts as the part of one that is likely to be trained, (trained + 1) / (ended + 1) of its domain.
    """
    expected = trained + in_flight * (trained + 1) / (ended + 1)
    lacking = weights / weights.sum() * (expected.sum() + 1) - expected
    return (np.arange(len(weights)) == lacking.argmax()).astype(np.float64)


MIXTURES = {"static": static, "adaptive": adaptive, "deficit": deficit}

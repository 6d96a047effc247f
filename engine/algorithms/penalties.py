"""Changes to the rewards of one group's completions, made on the learner's side: the record keeps the raw scores.

They are made when the group is complete and before it may be filtered for being uniform: a group that was solved as a
whole can still teach to be brief. Each function takes, for n valid completions of one prompt, the scores (float64 [n]),
lengths in tokens (int64 [n]), whether each was cut off at the token limit and whether it solved the task (bool [n]),
and returns new scores.
"""

from collections.abc import Callable, Sequence

import numpy as np

from engine.algorithms.slots import Count, NonNegative, Positive, bind
from engine.config import Slot

Penalty = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def overlong(
    scores: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, solved: np.ndarray, *, limit: Count, buffer: Count
) -> np.ndarray:
    """score - clip((length - (limit - buffer)) / buffer, 0, 1).

    Nothing up to `limit - buffer` tokens, then growing evenly to 1 at `limit`. DAPO's soft overlong punishment,
    arXiv:2503.14476.
    """
    return scores - np.clip((lengths - (limit - buffer)) / buffer, 0.0, 1.0)


def difficulty_aware(
    scores: np.ndarray,
    lengths: np.ndarray,
    truncated: np.ndarray,
    solved: np.ndarray,
    *,
    limit: Count,
    buffer: Count,
    gamma: Positive = 1.0,
    failed: NonNegative = 1.0,
) -> np.ndarray:
    """score - weight * clip((length - (limit - buffer)) / buffer, 0, 1).

    `overlong` with a weight for each completion: s^gamma where it is solved, s the share of the group that is, so that
    hard prompts may take long; `failed` where it is not; 1 where it was cut off. Apriel-Reasoner, arXiv:2604.02007.
    """
    weight = np.where(truncated, 1.0, np.where(solved, solved.mean() ** gamma, failed))
    return scores + weight * (overlong(scores, lengths, truncated, solved, limit=limit, buffer=buffer) - scores)


def truncated_zero(scores: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, solved: np.ndarray) -> np.ndarray:
    """0 for a completion that was cut off, whatever its score."""
    return np.where(truncated, 0.0, scores)


def length(
    scores: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, solved: np.ndarray, *, weight: Positive
) -> np.ndarray:
    """score + weight * (x if solved else min(x, 0)), x = 1/2 - (length - shortest) / (longest - shortest).

    Among completions of one prompt the short are promoted, but only the solved among them; unchanged where all are
    equally long. Kimi k1.5, arXiv:2501.12599.
    """
    span = np.ptp(lengths)
    if span == 0:
        return scores
    x = 0.5 - (lengths - lengths.min()) / span
    return scores + weight * np.where(solved, x, np.minimum(x, 0.0))


PENALTIES = {
    "overlong": overlong,
    "difficulty_aware": difficulty_aware,
    "truncated_zero": truncated_zero,
    "length": length,
}


def compose_penalties(slots: Sequence[Slot]) -> Penalty:
    """The penalties that a configuration lists, applied in its order. Raises `ConfigError`."""
    penalties = [bind(f"algorithm.penalties.{number}", slot, PENALTIES) for number, slot in enumerate(slots)]

    def penalise(scores: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, solved: np.ndarray) -> np.ndarray:
        for penalty in penalties:
            scores = penalty(scores, lengths, truncated, solved)
        return scores

    return penalise

"""The scores of one group as training sees them: the rewards with the configured penalties."""

from collections.abc import Callable

import numpy as np

from engine.algorithms.penalties import compose_penalties
from engine.config import Algorithm
from engine.schema import Group

Shape = Callable[[Group], np.ndarray]  # -> float64 [num_samples]; meaningless where a verdict has an error


def shape_by(algorithm: Algorithm) -> Shape:
    """The function that applies `algorithm.penalties`, and under `algorithm.shuffle_rewards` deals each group's scores
    out anew, always alike for the same group. Raises `ConfigError` for a penalty that does not exist."""
    penalise = compose_penalties(algorithm.penalties)

    def shape(group: Group) -> np.ndarray:
        scores = np.array([verdict.score for verdict in group.verdicts], np.float64)
        if algorithm.shuffle_rewards:
            valid = np.flatnonzero([not verdict.error for verdict in group.verdicts])
            scores[valid] = np.random.default_rng(group.group_id).permutation(scores[valid])
        return penalise(
            scores,
            np.array(group.lengths, np.int64),
            np.array([finish == "length" for finish in group.finish], bool),
            np.array([verdict.solved for verdict in group.verdicts], bool),
        )

    return shape

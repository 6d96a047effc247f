"""The scores of one group as training sees them: the rewards with the configured penalties."""

from collections.abc import Callable, Sequence

import numpy as np

from engine.algorithms.penalties import compose_penalties
from engine.config import Slot
from engine.schema import Group

Shape = Callable[[Group], np.ndarray]  # -> float64 [num_samples]; meaningless where a verdict has an error


def shape_by(slots: Sequence[Slot]) -> Shape:
    """The function that applies the penalties of `slots`. Raises `ConfigError` for one that does not exist."""
    penalise = compose_penalties(slots)

    def shape(group: Group) -> np.ndarray:
        return penalise(
            np.array([verdict.score for verdict in group.verdicts], np.float64),
            np.array(group.lengths, np.int64),
            np.array([finish == "length" for finish in group.finish], bool),
            np.array([verdict.solved for verdict in group.verdicts], bool),
        )

    return shape

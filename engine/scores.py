"""One group as training sees it: the rewards with the configured penalties, and which completions train."""

from collections.abc import Callable

import numpy as np

from engine.algorithms.penalties import compose_penalties
from engine.config import Algorithm, Config
from engine.schedule import Schedule
from engine.schema import Group

Shape = Callable[[Group], np.ndarray]  # -> float64 [num_samples]; meaningless where a verdict has an error


def shape_by(algorithm: Algorithm) -> Shape:
    """The function that applies `algorithm.penalties`, and under `algorithm.shuffle_rewards` deals each group's scores
    out anew, always alike for the same group. Raises `ConfigError` for a penalty that does not exist."""
    penalise = compose_penalties(algorithm.penalties)

    def shape(group: Group) -> np.ndarray:
        scores = np.array([verdict.score for verdict in group.verdicts], np.float64)
        valid = np.flatnonzero([not verdict.error for verdict in group.verdicts])
        if algorithm.shuffle_rewards:
            scores[valid] = np.random.default_rng(group.group_id).permutation(scores[valid])
        solved = np.array([verdict.solved for verdict in group.verdicts], bool)
        facts = scores, np.array(group.lengths, np.int64), truncated(group), solved
        if len(valid):
            scores[valid] = penalise(*(fact[valid] for fact in facts))
        return scores

    return shape


def scheduled_shape(config: Config) -> Shape:
    """`shape_by` what the schedule says at the version that a group was leased at."""
    schedule = Schedule(config)
    shapes = [shape_by(entry.algorithm) for entry in schedule.configs]
    return lambda group: shapes[schedule.entry(group.lease_version)](group)


def left_out(schedule: Schedule, group: Group) -> np.ndarray:
    """bool [num_samples]: the completions that count in their group's baseline but do not train."""
    filters = schedule.at(group.lease_version).algorithm.overlong_filter
    return truncated(group) if filters else np.zeros(group.num_samples, bool)


def truncated(group: Group) -> np.ndarray:
    """bool [num_samples]: cut off at the token limit."""
    return np.array([finish == "length" for finish in group.finish], bool)

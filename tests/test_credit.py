"""Advantages of whole groups: each group is its own baseline, and what has no judgement is no part of it."""

import learning
import msgspec
import numpy as np
import pytest

from engine.algorithms.method import Method, compose
from engine.credit import advantages
from engine.schema import Group
from engine.scores import shape_by
from rewards.verdict import Verdict

FAILED = None


def group(*scores: float | None) -> Group:
    """A group of completions with these scores; None for one beyond judgement."""
    verdicts = [Verdict.failed("died") if score is None else Verdict(score, False) for score in scores]
    return msgspec.structs.replace(
        learning.groups(1)[0], lengths=[1] * len(scores), finish=["stop"] * len(scores), verdicts=verdicts
    )


def method(name: str) -> Method:
    return compose(learning.configure(f"algorithm.advantage={{ name = '{name}' }}").algorithm)


RAW = shape_by(learning.configure().algorithm)


def test_each_group_is_its_own_baseline() -> None:
    first, second = advantages(method("group_mean"), RAW, [group(1.0, 0.0, 0.0, 1.0), group(2.0, 8.0)])
    assert first.tolist() == [0.5, -0.5, -0.5, 0.5]
    assert second.tolist() == [-3.0, 3.0]
    assert first.dtype == second.dtype == np.float32


def test_completion_without_judgement_moves_no_baseline_and_has_none() -> None:
    batch = [group(1.0, FAILED, 0.0), group(FAILED, FAILED, 5.0, 3.0, 1.0), group(4.0, 2.0, FAILED)]
    values = advantages(method("group_mean"), RAW, batch)
    assert [each.tolist() for each in values] == [[0.5, 0.0, -0.5], [0.0, 0.0, 2.0, 0.0, -2.0], [1.0, -1.0, 0.0]]
    alone = advantages(method("leave_one_out"), RAW, batch[:1])
    assert alone[0].tolist() == [1.0, 0.0, -1.0]


def test_group_without_any_judgement_is_left_at_zero() -> None:
    values = advantages(method("group_mean"), RAW, [group(1.0, 0.0), group(FAILED, FAILED), group(0.0, 4.0)])
    assert [each.tolist() for each in values] == [[0.5, -0.5], [0.0, 0.0], [-2.0, 2.0]]


def test_normalised_advantages_have_deviation_one() -> None:
    (values,) = advantages(method("group_norm"), RAW, [group(3.0, FAILED, 1.0)])
    assert values == pytest.approx([1.0, 0.0, -1.0], abs=1e-5)


def test_penalties_count_before_the_baseline() -> None:
    zeroing = shape_by(learning.configure("algorithm.penalties=[{ name = 'truncated_zero' }]").algorithm)
    cut = msgspec.structs.replace(group(1.0, 1.0), finish=["stop", "length"])
    (values,) = advantages(method("group_mean"), zeroing, [cut])
    assert values.tolist() == [0.5, -0.5]

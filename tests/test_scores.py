"""Scores as training sees them: penalties in the configured order, and the control that deals them out anew."""

from typing import Any

import learning
import msgspec
import numpy as np
import pytest

from engine.buffer import early_end
from engine.config import ConfigError
from engine.schema import Finish, Group
from engine.scores import Shape, shape_by
from rewards.verdict import Verdict


def shape(*overrides: str) -> Shape:
    return shape_by(learning.configure(*overrides).algorithm)


def group(verdicts: list[Verdict], lengths: list[int], finish: list[Finish], **changes: Any) -> Group:
    return msgspec.structs.replace(learning.groups(1)[0], verdicts=verdicts, lengths=lengths, finish=finish, **changes)


PAIR = group([Verdict(1.0, True), Verdict(0.5, False)], [4, 10], ["stop", "length"])


def test_without_penalties_the_scores_are_the_rewards() -> None:
    assert shape()(PAIR).tolist() == [1.0, 0.5]


def test_penalties_apply_in_their_order() -> None:
    overlong, zero = "{ name = 'overlong', limit = 10, buffer = 8 }", "{ name = 'truncated_zero' }"
    assert shape(f"algorithm.penalties=[{overlong}]")(PAIR).tolist() == [0.75, -0.5]  # 2 of 8 and 8 of 8 too long
    assert shape(f"algorithm.penalties=[{overlong}, {zero}]")(PAIR).tolist() == [0.75, 0.0]
    assert shape(f"algorithm.penalties=[{zero}, {overlong}]")(PAIR).tolist() == [0.75, -1.0]


def test_penalties_know_what_was_solved() -> None:
    assert shape("algorithm.penalties=[{ name = 'length', weight = 1.0 }]")(PAIR).tolist() == [1.5, 0.0]
    both = msgspec.structs.replace(PAIR, lengths=[10, 4])
    assert shape("algorithm.penalties=[{ name = 'length', weight = 1.0 }]")(both).tolist() == [0.5, 0.5]


def test_a_solved_group_is_filtered_only_where_its_lengths_cost_alike() -> None:
    """The penalty comes before the filter."""
    slot = "algorithm.penalties=[{ name = 'difficulty_aware', limit = 10, buffer = 8 }]"
    solved = group([Verdict(1.0, True)] * 2, [4, 10], ["stop", "stop"])
    assert early_end(solved, shape(slot)) == (None, "")
    assert early_end(solved, shape()) == ("filtered", "all scores 1")


def test_unknown_penalty_is_named() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.penalties\.1"):
        shape("algorithm.penalties=[{ name = 'truncated_zero' }, { name = 'none_such' }]")


def test_shuffled_scores_are_dealt_out_anew_within_the_group_and_always_alike() -> None:
    scores = [float(number) for number in range(8)]
    shuffled = shape("algorithm.shuffle_rewards=true")
    eight = group([Verdict(score, False) for score in scores], [1] * 8, ["stop"] * 8)
    dealt = {number: shuffled(msgspec.structs.replace(eight, group_id=number)).tolist() for number in range(20)}
    assert all(sorted(each) == scores for each in dealt.values())
    assert len(set(map(tuple, dealt.values()))) == 20
    assert dealt[3] == shuffled(msgspec.structs.replace(eight, group_id=3)).tolist()
    assert np.mean([each[0] for each in dealt.values()]) == pytest.approx(3.5, abs=2.0)


def test_shuffling_keeps_to_the_valid() -> None:
    verdicts = [Verdict(1.0, True), Verdict.failed("died"), Verdict(2.0, True)]
    shuffled = shape("algorithm.shuffle_rewards=true")
    for number in range(8):
        scores = shuffled(group(verdicts, [1] * 3, ["stop"] * 3, group_id=number))
        assert sorted(scores[[0, 2]].tolist()) == [1.0, 2.0]

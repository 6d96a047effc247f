"""Advantages of whole groups: each group is its own baseline, and what has no judgement is no part of it."""

import learning
import msgspec
import numpy as np
import pytest

from engine.algorithms.method import Method, compose
from engine.config import ConfigError
from engine.credit import advantages
from engine.learner_loop import prepare
from engine.schedule import Schedule
from engine.schema import Group
from engine.scores import shape_by
from rewards.verdict import Segment, Verdict

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


# ---- by segment --------------------------------------------------------------------------------------------------


def divided(*samples: tuple[list[tuple[int, float]], str], failed: tuple[int, ...] = ()) -> Group:
    """Completions whose segments have so many tokens and such scores, and their finish."""
    verdicts = [
        Verdict.failed("no score")
        if number in failed
        else Verdict(0.5, False, segments=[Segment(0, s) for _, s in parts])
        for number, (parts, _) in enumerate(samples)
    ]
    ends = [np.cumsum([size for size, _ in parts]).tolist() for parts, _ in samples]
    lengths = [end[-1] for end in ends]
    kinds = {"token_ids": np.int32, "loss_mask": np.uint8, "logprobs": np.float32, "versions": np.int32}
    tokens = {name: np.ones(sum(lengths), kind) for name, kind in kinds.items()}
    finish = [finish for _, finish in samples]
    return msgspec.structs.replace(
        learning.groups(1)[0], lengths=lengths, finish=finish, verdicts=verdicts, segment_ends=ends, **tokens
    )


def test_every_token_has_its_segments_advantage() -> None:
    first = divided(([(2, 0.25), (1, 0.75)], "stop"), ([(3, 1.0)], "stop"))
    second = divided(([(1, 0.5), (2, 0.0)], "stop"), ([(1, 0.0), (1, 1.0)], "stop"))
    values = advantages(method("process_delta"), RAW, [first, second])
    assert [each.tolist() for each in values] == [[-0.5, -0.5, 0.5, 0, 0, 0], [0.5, -0.5, -0.5, -1.0, 1.0]]
    (ablated,) = advantages(method("process_group"), RAW, [second])
    assert ablated.tolist() == [0.125, -0.375, -0.375, -0.375, 0.625]


def test_what_the_judge_could_not_score_or_what_was_cut_off_has_no_advantage() -> None:
    group = divided(([(1, 0.0), (2, 1.0)], "length"), ([(2, 0.0)], "stop"), ([(1, 0.0), (1, 0.5)], "stop"), failed=(1,))
    (values,) = advantages(method("process_delta"), RAW, [group])
    assert values.tolist() == [0, 0, 0, 0, 0, -0.5, 0.5]
    config = learning.configure("algorithm.advantage={ name = 'process_delta' }")
    (update,) = prepare(Schedule(config), method("process_delta"), RAW, [group], version=0)
    assert update.num_sequences == 2  # masked as a whole, not scored 0


def test_a_reward_without_segments_is_refused() -> None:
    with pytest.raises(ConfigError, match="the reward of domain 'd' did not"):
        advantages(method("process_delta"), RAW, [group(1.0, 0.0)])


# ---- by token ----------------------------------------------------------------------------------------------------


def test_a_critic_gets_the_score_at_the_last_token_that_the_policy_chose() -> None:
    taken = msgspec.structs.replace(
        learning.groups(1)[0],
        lengths=[2, 3],
        finish=["stop", "stop"],
        verdicts=[Verdict(0.5, False), Verdict(2.0, True)],
        token_ids=np.zeros(5, np.int32),
        loss_mask=np.array([1, 1, 1, 1, 0], np.uint8),
    )
    (rewards,) = advantages(method("gae"), RAW, [taken])
    assert rewards.tolist() == [0, 0.5, 0, 2.0, 0]


def test_penalties_count_before_the_baseline() -> None:
    zeroing = shape_by(learning.configure("algorithm.penalties=[{ name = 'truncated_zero' }]").algorithm)
    cut = msgspec.structs.replace(group(1.0, 1.0), finish=["stop", "length"])
    (values,) = advantages(method("group_mean"), zeroing, [cut])
    assert values.tolist() == [0.5, -0.5]


@pytest.mark.parametrize(("step", "num_sequences", "gains"), [(0, 4, {0.25, -0.75}), (1, 3, {0.25})])
def test_what_the_overlong_filter_takes_counts_in_the_baseline_and_does_not_train(step, num_sequences, gains) -> None:
    """The schedule turns it on after the first step."""
    config = learning.configure("schedule=[{ step = 1, algorithm = { overlong_filter = true } }]")
    verdicts = [Verdict(score, score == 1.0) for score in (1.0, 0.0, 1.0, 1.0)]
    finish = ["stop", "length", "stop", "stop"]
    group = msgspec.structs.replace(learning.groups(1)[0], lease_version=step, finish=finish, verdicts=verdicts)
    (update,) = prepare(Schedule(config), method("group_mean"), RAW, [group], version=step)
    micro_batches = [micro for micros in update.micro_batches for micro in micros]
    assert update.num_sequences == num_sequences
    assert {float(gain) for micro in micro_batches for gain in micro.advantage} == gains

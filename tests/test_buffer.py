import fake_run
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.buffer import Buffer, Waiting, early_end, in_time
from engine.schema import Group, Lease, Sampling


def group(group_id: int, *versions: int, scores: tuple[float, ...] = (0.0, 1.0), errors: int = 0) -> Group:
    prompt = fake_run.CountingPrompts().prompt("a", group_id)
    lease = Lease("train", group_id, 1, min(versions, default=0), 0, len(scores), prompt, Sampling(1.0, 8))
    return fake_run.result(lease, versions=list(versions), scores=lambda sample: scores[sample], errors=errors)


def buffer(max_staleness: int, *groups: Group) -> Buffer:
    filled = Buffer(max_staleness)
    for each in groups:
        filled.admit(Waiting(each, arrived_s=0.0, arrival_version=0))
    return filled


def ids(taken: list[Waiting] | None) -> list[int] | None:
    return None if taken is None else [waiting.group.group_id for waiting in taken]


def test_waits_for_enough_groups() -> None:
    filled = buffer(4, group(0, 0))
    assert filled.take(2, 0, []) is None
    filled.admit(Waiting(group(1, 0), 0.0, 0))
    assert ids(filled.take(2, 0, [])) == [0, 1]
    assert len(filled) == 0


def test_oldest_ticket_first_whatever_the_order_of_arrival() -> None:
    filled = buffer(1, group(5, 0), group(3, 0), group(4, 0))
    assert ids(filled.take(2, 0, [])) == [3, 4]


def test_the_older_first_token_goes_before_the_older_ticket() -> None:
    filled = buffer(1, group(0, 1), group(1, 0))
    assert ids(filled.take(1, 1, [])) == [1]


def test_a_straggler_is_passed_over_while_it_can_still_be_in_time() -> None:
    """At staleness 2 a group leased at 0 must be taken at 2 at the latest: it may be passed over at 0 and at 1."""
    filled = buffer(2, group(1, 0), group(2, 1), group(3, 2))
    straggler = [0]
    assert ids(filled.take(1, 0, straggler)) == [1]
    assert ids(filled.take(1, 1, straggler)) == [2]
    assert filled.take(1, 2, straggler) is None
    filled.admit(Waiting(group(0, 0), 0.0, 0))
    assert ids(filled.take(1, 2, [])) == [0]


def test_waits_when_two_stragglers_share_the_last_place() -> None:
    assert buffer(1, group(2, 0)).take(1, 0, [0]) is not None
    assert buffer(1, group(2, 0)).take(1, 0, [0, 0]) is None


def test_staleness_zero_passes_nobody_over() -> None:
    assert buffer(0, group(1, 3)).take(1, 3, [3]) is None
    assert ids(buffer(0, group(1, 3)).take(1, 3, [])) == [1]


def test_only_groups_without_one_fresh_token_expire() -> None:
    filled = buffer(1, group(0, 0, 1), group(1, 0, 4), group(2, 4), group(3))
    assert filled.expire(version=1) == []
    assert ids(filled.expire(version=5)) == [0, 3]
    assert ids(filled.waiting()) == [1, 2]


@given(st.lists(st.integers(0, 8), max_size=12), st.integers(0, 6), st.integers(1, 3))
def test_in_time_is_the_rule_word_by_word(deadlines: list[int], version: int, groups_per_step: int) -> None:
    rule = all(
        sum(deadline <= later for deadline in deadlines) <= (later - version) * groups_per_step
        for later in range(version, 12)
    )
    assert in_time(deadlines, version, groups_per_step) == rule


def test_too_few_valid_completions_fail() -> None:
    end, reason = early_end(group(0, 0, scores=(1.0, 0.0, 1.0), errors=2), fake_run.raw_scores)
    assert (end, reason) == ("failed", "1 valid completions of 3: died")
    assert early_end(group(0, 0, scores=(9.0, 0.0, 1.0), errors=1), fake_run.raw_scores) == (None, "")


def test_equal_scores_are_filtered_after_penalties_and_among_the_valid() -> None:
    uniform = group(0, 0, scores=(7.0, 1.0, 1.0), errors=1)
    assert early_end(uniform, fake_run.raw_scores) == ("filtered", "all scores 1")
    assert early_end(uniform, lambda group: np.array([0.0, 1.0, 0.5])) == (None, "")
    assert early_end(uniform, None) == (None, "")


@pytest.mark.parametrize(("errors", "end"), [(0, None), (1, "failed")])
def test_a_group_of_one_needs_one_valid_completion_and_is_never_uniform(errors: int, end: str | None) -> None:
    assert early_end(group(0, 0, scores=(1.0,), errors=errors), fake_run.raw_scores)[0] == end

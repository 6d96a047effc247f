import math

import fake_run
import pytest

from engine.evaluation import Surveys, score
from engine.schema import Group, Sampling

PAIRS, TRIPLES = (Sampling(1.0, 8), 2), (Sampling(1.0, 8), 3)


def finished(surveys: Surveys, *outcomes: tuple[float, ...], versions: tuple[int, ...] = (0,)) -> list[Group]:
    """Each next task, with one score a sample."""
    groups = []
    for scores in outcomes:
        task = surveys.next_task()
        assert task is not None
        group = fake_run.result(
            task.lease(seed=0), scores=lambda sample, scores=scores: scores[sample], versions=list(versions)
        )
        surveys.add(task, group, now=7.0)
        groups.append(group)
    return groups


def begun(wait: bool = True) -> Surveys:
    surveys = Surveys()
    surveys.begin("before", "eval", wait, fake_run.CountingPrompts().held_out(), PAIRS, now=4.0)
    return surveys


def test_the_mean_is_over_prompts_and_the_error_clustered_by_prompt() -> None:
    """Shares 1, 1/2, 0: mean 1/2, sd 1/2, standard error 0.5 / sqrt(3)."""
    surveys = begun()
    finished(surveys, (1.0, 1.0), (1.0, 0.0), (0.0, 0.0), versions=(3, 5))
    result = surveys.evaluation("before")
    assert result is not None and surveys.evaluation("before") is None
    assert (result.first_version, result.last_version, result.wall_s) == (3, 5, 3.0)
    assert set(result.scores) == {"a", "all"}
    total = result.scores["all"]
    assert (total.accuracy, total.reward, total.num_prompts, total.num_completions) == (0.5, 0.5, 3, 6)
    assert total.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert total.mean_length == 2.0


def test_completions_without_a_judgement_are_left_out_and_counted() -> None:
    surveys = begun()
    task = surveys.next_task()
    assert task is not None
    half, none = (fake_run.result(task.lease(0), errors=errors) for errors in (1, 2))
    result = score([half, none], num_lost=2)
    assert (result.accuracy, result.num_prompts, result.num_invalid, result.num_completions) == (1.0, 1, 5, 4)
    assert math.isnan(result.stderr)


def test_a_group_given_up_does_not_hold_the_rest_back() -> None:
    surveys = begun()
    finished(surveys, (1.0, 1.0), (1.0, 1.0))
    task = surveys.next_task()
    assert task is not None and surveys.waited_for
    surveys.give_back(task)
    assert surveys.next_task() is task
    surveys.give_up(task, now=9.0)
    result = surveys.evaluation("before")
    assert result is not None and not surveys.waited_for
    assert result.scores["a"].num_invalid == 2


def test_one_that_nobody_waits_for_is_completed_and_may_meet_its_like() -> None:
    surveys = begun(wait=False)
    surveys.begin("before", "eval", False, fake_run.CountingPrompts().held_out(), PAIRS, now=4.0)
    assert surveys.under_way() == ["before", "before"]
    finished(surveys, *[(1.0, 1.0)] * 6)
    assert [evaluation.scores["all"].num_prompts for evaluation in surveys.completed] == [3, 3]
    assert surveys.under_way() == []


def test_every_evaluation_draws_other_random_numbers() -> None:
    surveys = begun()
    surveys.begin("after", "eval", True, fake_run.CountingPrompts().held_out(), PAIRS, now=4.0)
    tasks = [surveys.next_task() for _ in range(6)]
    assert [task.group_id for task in tasks if task] == [0, 1, 2, 3, 4, 5]


def test_nothing_held_out_is_done_at_once() -> None:
    surveys = Surveys()
    surveys.begin("before", "eval", True, [], PAIRS, now=0.0)
    result = surveys.evaluation("before")
    assert result is not None and result.scores == {}


def test_a_probe_hands_out_its_groups() -> None:
    surveys = Surveys()
    surveys.begin("parity", "probe", True, fake_run.CountingPrompts().held_out()[:1], TRIPLES, now=0.0)
    assert surveys.probe("parity") is None
    groups = finished(surveys, (1.0, 0.0, 1.0))
    assert surveys.probe("parity") == groups

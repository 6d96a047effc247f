"""The health figures, by hand: staleness split at arrival, idle shares and rates between steps, what is written."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_run
import msgspec
import numpy as np
import pytest
import torch

from engine import metrics
from engine.algorithms.method import Tokens, compose
from engine.config import Algorithm, ConfigError
from engine.learner import Outcome, summary
from engine.metrics import Pace, Recorder, bottleneck, evaluation_record, rollouts
from engine.schema import Evaluation, Group, Score, State, Taken
from rewards.verdict import Verdict


def group(domain: str, verdicts: list[Verdict], versions: list[list[int]], **changes: object) -> Group:
    """A group whose completion i has one token of each of the versions `versions[i]`."""
    num_tokens = sum(map(len, versions))
    plain = Group(
        kind="train",
        group_id=0,
        attempt=0,
        incarnation=0,
        generator="g",
        domain=domain,
        lease_version=0,
        temperature=1.0,
        prompt_ids=np.zeros(1, np.int32),
        lengths=[len(each) for each in versions],
        finish=["stop"] * len(versions),
        verdicts=verdicts,
        token_ids=np.zeros(num_tokens, np.int32),
        logprobs=np.zeros(num_tokens, np.float32),
        versions=np.concatenate(versions).astype(np.int32),
        loss_mask=np.ones(num_tokens, np.uint8),
    )
    return msgspec.structs.replace(plain, **changes)


def state(tokens: int = 0, busy_s: float = 0.0, idle_s: float = 0.0, generators: int = 1) -> State:
    return State(
        ends={},
        buffered_groups=3,
        leased_groups=5,
        generators={str(number): 0 for number in range(generators)},
        generated_tokens=tokens,
        generator_busy_s=busy_s,
        generator_idle_s=idle_s,
    )


def taken(groups: list[Group], arrival_versions: list[int]) -> Taken:
    return Taken(groups, [0.5 + number for number in range(len(groups))], arrival_versions, state())


RIGHT, WRONG, LOST = Verdict(1.0, True), Verdict(0.5, False), Verdict.failed("died")


# ---- rollouts --------------------------------------------------------------------------------------------------


def test_staleness_is_split_at_the_arrival_and_weighted_by_token() -> None:
    early = group("a", [RIGHT, WRONG], [[5, 5, 6], [6]])  # arrived at 7, trained at 9: two versions in the queue
    late = group("a", [RIGHT, WRONG], [[8, 9], [9]])  # arrived at 9
    figures = rollouts(taken([early, late], [7, 9]), version=9)
    assert figures["staleness_histogram"] == [2, 1, 0, 2, 2]  # ages 4 4 3 3, 1 0 0
    assert figures["in_flight_histogram"] == [2, 3, 2]  # 2 2 1 1, 1 0 0
    assert figures["in_queue_histogram"] == [3, 0, 4]
    assert figures["staleness"] == pytest.approx(15 / 7)
    assert figures["staleness_in_flight"] == pytest.approx(7 / 7)
    assert figures["staleness_in_queue"] == pytest.approx(8 / 7)
    assert figures["staleness_max"] == 4


def test_staleness_leaves_out_what_cannot_train() -> None:
    observed = group("a", [RIGHT, LOST], [[3, 1], [0, 0]], loss_mask=np.array([1, 0, 1, 1], np.uint8))
    figures = rollouts(taken([observed], [3]), version=3)
    assert figures["staleness_histogram"] == [1]
    assert figures["staleness_max"] == 0


def test_judgements_leave_out_the_invalid_and_are_split_by_domain() -> None:
    groups = [
        group("sum", [RIGHT, WRONG], [[0], [0]]),
        group("reverse", [WRONG, LOST], [[0, 0], [0, 0, 0]], finish=["stop", "length"], kv_mixed=True),
    ]
    figures = rollouts(taken(groups, [0, 0]), version=0)
    assert figures["reward"] == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert (figures["accuracy/sum"], figures["accuracy/reverse"]) == (0.5, 0.0)
    assert (figures["reward/sum"], figures["reward/reverse"]) == (0.75, 0.5)
    assert (figures["num_invalid/sum"], figures["num_invalid/reverse"]) == (0, 1)
    assert (figures["num_invalid"], figures["truncated"], figures["kv_mixed"]) == (1, 0.25, 0.5)
    assert (figures["length"], figures["length_max"]) == (1.75, 3)
    assert (figures["queue_s"], figures["queue_s_max"]) == (1.0, 1.5)
    assert (figures["buffered_groups"], figures["leased_groups"], figures["generators"]) == (3, 5, 1)


def test_costs_are_averaged_over_the_verdicts_that_tell_them_also_failed_ones() -> None:
    dear = Verdict(1.0, True, costs={"judge_s": 3.0, "judge_tokens": 10.0})
    failed = Verdict(0.0, False, error="no score", costs={"judge_s": 1.0})
    figures = rollouts(taken([group("proofs", [dear, failed, RIGHT], [[0]] * 3)], [0]), version=0)
    assert (figures["judge_s/proofs"], figures["judge_tokens/proofs"]) == (2.0, 10.0)


def test_take_in_which_all_is_invalid_has_figures_too() -> None:
    figures = rollouts(taken([group("a", [LOST], [[0]])], [0]), version=2)
    assert figures["staleness_histogram"] == []
    assert (figures["reward"], figures["staleness"], figures["staleness_max"]) == (0.0, 0.0, 0)


# ---- pace ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_pace_between_two_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now_s += 20.0
    pace.step(state(tokens=1000, busy_s=50.0, idle_s=10.0), waited_s=5.0, trained_tokens=100)
    clock.now_s += 16.0
    row = pace.step(state(tokens=1800, busy_s=56.0, idle_s=12.0), waited_s=4.0, trained_tokens=480)
    assert (row["step_s"], row["wait_s"], row["trained_tokens"], row["generated_tokens"]) == (16.0, 4.0, 480, 1800)
    assert row["learner_idle"] == 4 / 16
    assert row["generator_idle"] == 2 / 8
    assert row["trained_tokens_per_s"] == 480 / 16
    assert row["generated_tokens_per_s"] == 800 / 8  # in the 8 s of which the heartbeats tell
    assert row["bottleneck"] == bottleneck(4 / 16, 2 / 8)


def test_pace_of_short_steps_covers_the_window() -> None:
    clock = Clock()
    pace = Pace(clock)
    rows = []
    for number in range(1, 31):  # steps of a second; a heartbeat every other one
        clock.now_s += 1.0
        beats = number // 2
        waited_s = 1.0 if number > 20 else 0.0
        rows.append(pace.step(state(200 * beats, 1.5 * beats, 0.5 * beats, generators=3), waited_s, 10))
    assert rows[24]["learner_idle"] == 5 / metrics.WINDOW_S
    assert [row["learner_idle"] for row in rows[:20]] == [0.0] * 20
    assert rows[-1]["learner_idle"] == 1.0
    for row in rows[10:]:
        assert row["generator_idle"] == 0.25
        assert row["generated_tokens_per_s"] == 3 * 100.0  # three generators, each 200 tokens in 2 s
        assert row["trained_tokens_per_s"] == 10.0


def test_pace_before_any_step_or_heartbeat_is_zero() -> None:
    clock = Clock()
    pace = Pace(clock)
    row = pace.step(state(), 0.0, 0)
    assert (row["learner_idle"], row["generated_tokens_per_s"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    "learner_idle, generator_idle, verdict",
    [(0.5, 0.5, "both"), (0.5, 0.1, "generation"), (0.1, 0.5, "training"), (0.15, 0.15, "balanced")],
)
def test_bottleneck_is_the_side_that_does_not_wait(learner_idle: float, generator_idle: float, verdict: str) -> None:
    assert bottleneck(learner_idle, generator_idle).startswith(verdict)


# ---- records ---------------------------------------------------------------------------------------------------


def recorder(directory: Path, **tracking: object) -> Recorder:
    config = fake_run.config()
    tracked = msgspec.structs.replace(config.tracking, **tracking)
    config = msgspec.structs.replace(config, tracking=tracked)
    return Recorder(config, directory / "metrics.jsonl", directory / "tensorboard")


def test_records_are_strict_json_and_appended(tmp_path: Path) -> None:
    for step in (1, 2):
        log = recorder(tmp_path, tensorboard=False)
        log.record({"kind": "step", "step": step, "reward": float("nan"), "staleness_histogram": [1, 2]})
        log.close()
    rows = [json.loads(text, parse_constant=pytest.fail) for text in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["reward"] is None and rows[0]["staleness_histogram"] == [1, 2] and rows[0]["time"] > 0


def test_tensorboard_has_every_number_once_the_recorder_is_closed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = recorder(tmp_path)
    log.record({"kind": "step", "step": 3, "reward": 0.5, "bottleneck": "balanced", "staleness_histogram": [1]})
    log.close()
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["step/reward"]
    assert [(event.step, event.value) for event in events.Scalars("step/reward")] == [(3, 0.5)]


class Dashboard:
    """A run of Weights & Biases as its client keeps it: a row for a step that has passed is dropped."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.axes: dict[str, str | None] = {}
        self.step, self.finish = 0, lambda: None
        self.settings: dict[str, Any] = {}

    def begin(self, **settings: Any) -> "Dashboard":
        self.settings = settings
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, numbers: dict[str, float], step: int | None = None) -> None:
        if step is None or step >= self.step:
            self.rows.append(numbers)
            self.step = self.step + 1 if step is None else step


def test_an_evaluation_of_an_earlier_step_reaches_the_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Dashboard()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=board.begin))
    log = recorder(tmp_path, tensorboard=False, wandb_project="mine")
    log.record({"kind": "step", "step": 3, "reward": 0.5})
    log.record({"kind": "evaluation", "step": 2, "accuracy/all": 0.25})
    log.close()
    assert board.rows == [{"step/reward": 0.5, "step": 3}, {"evaluation/accuracy/all": 0.25, "step": 2}]
    assert board.axes == {"step": None, "*": "step"}
    assert board.settings["config"]["tracking"]["wandb_project"] == "mine"


def test_missing_tracker_is_an_error_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = fake_run.config()
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics.check_tracking(config)
    wanted = msgspec.structs.replace(config.tracking, wandb_project="mine")
    with pytest.raises(ConfigError, match="tracking.wandb_project = 'mine': "):
        metrics.check_tracking(msgspec.structs.replace(config, tracking=wanted))


def test_evaluation_is_one_flat_row() -> None:
    score = Score(0.5, 0.1, 0.6, num_prompts=8, num_completions=16, num_invalid=1, mean_length=3.0)
    row = evaluation_record(Evaluation("after", 4, 6, 2.5, {"sum": score, "all": score}), step=7)
    assert (row["kind"], row["name"], row["step"]) == ("evaluation", "after", 7)
    assert (row["first_version"], row["last_version"], row["wall_s"]) == (4, 6, 2.5)
    assert (row["accuracy/sum"], row["stderr/all"], row["num_prompts/sum"], row["mean_length/all"]) == (0.5, 0.1, 8, 3)


def test_every_figure_is_explained() -> None:
    table = (metrics.__doc__ or "").split("meaning\n")[1].split("\n\n")[0]
    explained = {name for line in table.splitlines() for name in re.findall(r"[\w/]+(?=,|  |$)", line[:30])}
    figures = rollouts(taken([group("DOMAIN", [RIGHT], [[0]])], [0]), 0) | Pace(Clock()).step(state(), 0.0, 0)
    assert not (set(figures) | learner_figures()) - explained


def learner_figures() -> set[str]:
    """What a learner's step may tell: every term of the loss switched on."""
    ones = torch.ones(2)
    tokens = Tokens(ones, ones, ones, torch.tensor([0, 0]), torch.tensor([2]), None, ones, torch.tensor([0, 0]))
    method = compose(Algorithm(kl={"name": "k3", "coefficient": 1.0}, entropy=1.0))
    _, sums = method.loss(ones, ones, tokens, num_tokens=2, num_sequences=1)
    return set(summary([Outcome(0.0, 0.0, {name: float(value) for name, value in sums.items()})]))

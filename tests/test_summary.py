"""What a run came to, over all its launches."""

from typing import Any

import pytest

from engine.schema import State
from engine.summary import summarise


def step(number: int, time: float, **changes: Any) -> dict[str, Any]:
    figures = {"step_s": 10.0, "wait_s": 4.0, "trained_tokens": 100, "trained_staleness_max": number % 3}
    return {"kind": "step", "step": number, "time": time, **figures, **changes}


def totals(tokens: int, busy_s: float, idle_s: float) -> dict[str, Any]:
    return {"generated_tokens": tokens, "generator_busy_s": busy_s, "generator_idle_s": idle_s}


def evaluation(name: str, accuracy: float, time: float) -> dict[str, Any]:
    figures = {"accuracy/all": accuracy, "stderr/all": 0.01, "accuracy/sum": accuracy / 2}
    return {"kind": "evaluation", "name": name, "step": 0, "time": time, **figures}


def state(generated_tokens: int) -> State:
    return State({"trained": 12}, 0, 0, {}, generated_tokens, 0.0, 0.0)


RESUMED = [
    {"kind": "parity", "step": 0, "time": 1000.0},
    evaluation("before", 0.25, 1005.0),
    step(1, 1020.0, **totals(500, 5.0, 1.0)),
    step(2, 1030.0, **totals(900, 13.0, 3.0)),
    {"kind": "parity", "step": 2, "time": 5000.0},  # hours later
    step(3, 5020.0, **totals(450, 4.0, 2.0)),
    step(4, 5030.0, wait_s=6.0, **totals(800, 10.0, 4.0)),
    evaluation("after", 0.75, 5040.0),
]


def test_a_resumed_run_is_summed_over_its_launches() -> None:
    assert summarise(RESUMED, state(1000), wall_s=60.0) == {
        "accuracy_before": 0.25,
        "accuracy_after": 0.75,
        "accuracy_stderr": 0.01,
        "domains": {"sum": {"before": 0.125, "after": 0.375}},
        "wall_s": 60.0 + 30.0,  # without the hours in between
        "steps": 4,
        "trained_tokens": 400,
        "generated_tokens": 900 + 1000,  # counted anew by each launch
        "max_trained_staleness": 2,
        "groups": {"trained": 12},
        "learner_idle": pytest.approx(18 / 40),
        "generator_idle": pytest.approx((2 + 2) / (8 + 2 + 6 + 2)),
    }


def test_what_was_not_measured_is_left_open() -> None:
    rows = [{"kind": "parity", "step": 0, "time": 0.0}, step(1, 10.0, **totals(100, 1.0, 1.0))]
    summary = summarise(rows, state(120), wall_s=12.0)
    assert summary["accuracy_before"] is summary["accuracy_after"] is None and summary["domains"] == {}
    assert (summary["steps"], summary["generated_tokens"], summary["wall_s"]) == (1, 120, 12.0)

"""The loop's course, told to a job that only notes what it is told to do."""

from types import SimpleNamespace
from typing import Any

import fake_run
import pytest

from engine.learner_loop import Job, learn
from engine.process import Stopped
from engine.schema import Evaluation, State, Taken

EVALUATION = Evaluation("step 1", 1, 1, 0.5, {})
STATE = State({}, 0, 0, {}, 0, 0.0, 0.0, [EVALUATION])


class Learner:
    version, critic = 0, None


class Stop:
    def error(self) -> Stopped:
        return Stopped("asked to stop")


class Noting:
    """A job whose takes are those given; `done` is what it was told to do."""

    config, holds_out, stop, end_early = fake_run.config(), False, Stop(), Job.end_early

    def __init__(self, *takes: Taken | None):
        self.takes, self.learner = iter(takes), Learner()
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.done.append(name)

    def take(self) -> tuple[Taken | None, float]:
        return next(self.takes), 0.0

    def step(self, taken: Taken) -> dict[str, Any]:
        self.learner.version += 1
        return {}

    def say(self, text: str) -> None:
        self.done.append(text)


GROUPS = Taken([], [], [], STATE)
START = ["publish", "check_parity", "evaluate_pinned", "save", "begin"]


def test_a_run_whose_prompts_are_exhausted_is_saved_and_ends_in_order() -> None:
    job = Noting(GROUPS, Taken([], [], [], STATE, "none left"))
    learn(job)  # type: ignore[arg-type]
    said = f"none left; the run ends at version 1 of {job.config.run.steps}"
    assert job.done == [*START, "publish", "record", said, "report_evaluation", "save", "evaluate_pinned"]


def test_a_stopped_run_is_saved() -> None:
    job = Noting(GROUPS, None)
    with pytest.raises(Stopped):
        learn(job)  # type: ignore[arg-type]
    assert job.done == [*START, "publish", "record", "save"]


@pytest.mark.parametrize(("stderr", "said"), [(0.017, "50.0% -> 75.0% (± 1.7%)"), (None, "50.0% -> 75.0%")])
def test_the_end_tells_the_accuracy_also_of_a_single_held_out_prompt(stderr: float | None, said: str) -> None:
    lines: list[str] = []
    run = SimpleNamespace(path="runs/a", export="runs/a/export")
    job = SimpleNamespace(progress=SimpleNamespace(close=lambda: None, say=lines.append), run=run)
    counts = dict.fromkeys(("steps", "wall_s", "trained_tokens", "generated_tokens"), 1)
    shares = {"accuracy_before": 0.5, "accuracy_after": 0.75, "accuracy_stderr": stderr}
    Job.show(job, {**counts, **shares, "learner_idle": 0.1, "generator_idle": 0.2})  # type: ignore[arg-type]
    assert lines[0] == f"held-out accuracy {said}"

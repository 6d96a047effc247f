"""The loop's course, told to a job that only notes what it is told to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_run
import pytest
from msgspec import structs

from engine import learner_loop, metrics
from engine.config import load
from engine.learner_loop import Job, learn
from engine.process import Stopped
from engine.run_directory import RunDirectory
from engine.schema import Evaluation, State, Taken
from rewards.verdict import Verdict

TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
EVALUATION = Evaluation("step 1", 1, 1, 0.5, {})
STATE = State({}, 0, 0, {}, 0, 0.0, 0.0, [EVALUATION])


class Learner:
    version = 0
    critic: Any = None


class Stop:
    def error(self) -> Stopped:
        return Stopped("asked to stop")


class Noting:
    """A job whose takes are those given; `done` is what it was told to do."""

    config, holds_out, stop, end_early = fake_run.config(), False, Stop(), Job.end_early

    run = SimpleNamespace(critic="critic")

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


def test_a_run_that_is_the_critics_alone_leaves_the_critic() -> None:
    """A first run that only makes a critic for those after it."""
    job = Noting(GROUPS, GROUPS)
    exported: list[int] = []
    job.learner.critic = SimpleNamespace(export=lambda path: exported.append(job.learner.version))
    settings = structs.replace(job.config.critic, pretrain_steps=2)
    job.config = structs.replace(fake_run.config(steps=2), critic=settings)
    learn(job)  # type: ignore[arg-type]
    assert exported == [2] and job.learner.version == 2


class Closing:
    """Something of a job that is to be closed: `order` is what was, in its order."""

    order: list[str] = []
    address, incarnation = "tcp://nowhere", 0

    def __init__(self, *arguments: Any, **options: Any):
        self.generators: list[Any] = []

    def start(self) -> None:
        self.order.append("started")

    def ask_to_stop(self) -> None:
        self.order.append("asked")

    def stop(self, grace_s: float) -> None:
        self.order.append("stopped")

    def close(self) -> None:
        self.order.append(type(self).__name__)


class Publisher(Closing):
    pass


class Rollouts(Closing):
    pass


class Progress(Closing):
    pass


def test_a_job_that_fails_at_its_start_closes_what_it_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tracker that cannot be reached, say: weights in shared memory and children must not outlive the job."""

    def refuse(*arguments: Any) -> None:
        raise ConnectionError("no tracker")

    fakes: dict[str, Any] = {"Learner": lambda *_, **__: SimpleNamespace(model=None)}
    fakes |= {"Supervisor": Closing, "make_publisher": Publisher, "Rollouts": Rollouts, "Progress": Progress}
    for name, fake in fakes.items():
        monkeypatch.setattr(learner_loop, name, fake)
    monkeypatch.setattr(metrics, "Recorder", refuse)
    monkeypatch.setattr(Closing, "order", [])
    seat = SimpleNamespace(rank=0, num_children=1, device="cpu", child_gpus=[], child_threads=1)
    run = RunDirectory(tmp_path)
    with pytest.raises(ConnectionError):
        Job(fake_run.config(), run, seat, Stop(), None, None)  # type: ignore[arg-type]
    assert Closing.order == ["started", "Progress", "asked", "stopped", "Rollouts", "Publisher"]


@pytest.mark.parametrize(
    ("overrides", "bound"),
    [
        ([], 1e-3),
        (["--generator.dtype=bfloat16"], 0.05),
        (["--learner.mixed_precision=true"], 0.05),
        (["--generator.dtype=bfloat16", "--learner.parity_bound=1e-4"], 1e-4),
    ],
)
def test_parity_is_as_close_as_the_numbers_are_wide(overrides: list[str], bound: float) -> None:
    for difference in (0.9 * bound, 1.1 * bound):
        told: list[dict[str, Any]] = []
        job = SimpleNamespace(
            phase=lambda name: None,
            rollouts=SimpleNamespace(probe=lambda: [SimpleNamespace(verdicts=[Verdict.of(1.0)])]),
            learner=SimpleNamespace(version=0, mismatch=lambda groups, difference=difference: difference),
            recorder=SimpleNamespace(record=told.append),
            config=load(TINY, overrides),
        )
        if difference < bound:
            Job.check_parity(job)  # type: ignore[arg-type]
            assert told[0]["mismatch"] == difference
        else:
            with pytest.raises(learner_loop.Mismatch, match=f"parity_bound = {bound}: .* differ by {difference:.3g}"):
                Job.check_parity(job)  # type: ignore[arg-type]


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

"""Stages: their configurations, their directories, and what a resume finds of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning
import pytest
import torch.distributed as dist

from engine import launch, run_directory, stages
from engine.config import Config, ConfigError, load
from engine.placement import Seat, seat
from engine.process import Stopped
from engine.run_directory import RunDirectory

TWO = (
    "stages=[{ name = 'short', run = { steps = 3 }, domains = ['d'] }, "
    "{ name = 'long', generator = { max_new_tokens = 16 }, curriculum = { pass_rate = [0.0, 0.375] } }]"
)


def configure(*overrides: str) -> Config:
    return learning.configure(TWO, "warm_start.steps=5", *overrides)


def test_a_stage_is_laid_over_the_file_and_begins_where_the_one_before_ends():
    first, second = stages.configs(configure(), Path("/r"))
    assert (first.run.steps, first.run.name, first.run.directory) == (3, "t-short", "/r/1-short")
    assert (first.generator.max_new_tokens, first.model.init["model_type"]) == (8, "qwen3")
    assert (second.run.steps, second.generator.max_new_tokens, second.run.directory) == (10, 16, "/r/2-long")
    assert (second.model.path, second.model.init) == ("/r/1-short/export", {})
    assert (first.warm_start.steps, second.warm_start.steps) == (5, 0)
    assert (second.curriculum.pass_rate, second.curriculum.rates) == ((0.0, 0.375), ["/r/1-short/pass_rates.jsonl"])
    assert first.stages == second.stages == []
    assert (first.run.seed, second.run.seed) == (0, 1)


def test_a_stage_picks_domains_by_name():
    two = "domains=[{ name = 'd', source = 'callable' }, { name = 'e', source = 'callable' }]"
    first, second = stages.configs(configure(two))
    assert [[domain.name for domain in stage.domains] for stage in (first, second)] == [["d"], ["d", "e"]]


def test_without_stages_there_is_the_run_itself():
    config = learning.configure()
    assert stages.configs(config) == [config]


def test_resuming_goes_on_after_the_stages_that_ended(tmp_path: Path):
    config = configure(f"run.root={tmp_path}")
    root = stages.open_root(config, None).path
    assert load(root / "config.toml") == config
    first, second = stages.configs(config, root)
    assert (stages.num_done(config, root), stages.to_resume(first)) == (0, None)
    begun = RunDirectory(Path(first.run.directory))
    begun.path.mkdir()
    (begun.path / "torn").touch()
    assert stages.to_resume(first) is None
    assert not begun.path.exists()  # it had no configuration yet
    begun.path.mkdir()
    begun.config.touch()
    assert stages.to_resume(first) == str(begun.path)
    assert stages.num_done(config, root) == 0
    begun.summary.touch()
    assert (stages.num_done(config, root), stages.to_resume(second)) == (1, None)
    stages.check_resumable(root, config)
    with pytest.raises(ConfigError, match="stages: the job to resume began with 1-short, not 1-brief, 2-long"):
        stages.check_resumable(root, learning.configure(TWO.replace("short", "brief")))


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name = 'short'", "name = 'a/b'", "stages.0.name = 'a/b': must be letters"),
        ("name = 'long', ", "", "stages.1.name = None: must be letters"),
        ("steps = 3", "stepz = 3", "stages.0: run.stepz = 3: unknown"),
        ("['d']", "['x']", "stages.0.domains = ['x']: must be a list of d"),
        ("steps = 3 }", "steps = 3 }, checkpoint = { export = false }", "stages.0: checkpoint.export = false"),
        ("domains = ['d']", "stages = []", "stages.0.stages: a stage has none of its own"),
    ],
)
def test_a_mistake_names_the_stage(old, new, line):
    with pytest.raises(ConfigError) as error:
        stages.configs(learning.configure(TWO.replace(old, new)))
    assert str(error.value).startswith(line)


def test_the_last_stage_need_export_nothing():
    stages.configs(learning.configure(TWO.replace("name = 'long'", "name = 'long', checkpoint = { export = false }")))


# ---- a job of several ranks ----


def place(rank: int, learners: int = 1) -> Seat:
    config = learning.configure(f"placement.learners={learners}")
    return seat(config, {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_PORT": "0"})


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs one rank of the job in `tmp_path`/job, a store that its ranks share, and the (stage's name,
    what to resume) of the learning that the rank was told to do."""
    store, told = dist.HashStore(), []
    monkeypatch.setattr(launch, "rendezvous", lambda place, timeout_s: store)
    monkeypatch.setattr(launch, "learner_rank", lambda stage, place, stop, resume, *rest: told.append((stage, resume)))

    def run(rank: int, resume: Path | None = None) -> None:
        config = configure(f"run.directory={tmp_path / 'job'}")
        launch.run(config, place(rank, learners=2), None, None if resume is None else str(resume))  # type: ignore[arg-type]

    return run, store, told


def test_no_rank_but_the_first_touches_a_stage_that_is_being_made(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, store, told = job
    monkeypatch.setattr(launch, "generator_rank", lambda stage, *rest: told.append((stage, None)))
    run(0)
    half = tmp_path / "job" / "1-short" / "stream"  # the first rank is making it
    half.mkdir(parents=True)
    run(1)
    run(2)
    assert half.exists()
    assert [resume for stage, resume in told] == [None] * 6


def test_one_job_holds_all_stages_from_the_first_to_the_last(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, store, told = job
    refused = []

    def learn(stage: Config, *rest: Any) -> None:
        with pytest.raises(ConfigError, match="another job is running in it"):
            stages.open_root(configure(), str(tmp_path / "job"))
        refused.append(stage.run.name)

    monkeypatch.setattr(launch, "learner_rank", learn)
    run(0)
    assert refused == ["t-short", "t-long"]
    stages.open_root(configure(), str(tmp_path / "job"))  # which is over


def test_a_stage_is_resumed_by_its_job(tmp_path: Path):
    config = configure(f"run.directory={tmp_path / 'job'}")
    root = stages.open_root(config, None).path
    first, _ = stages.configs(config, root)
    run_directory.create(first)
    stages.check_resumable(root, config)
    with pytest.raises(ConfigError, match=r"1-short: a run without stages; name the directory of the whole job"):
        stages.check_resumable(root / "1-short", config)
    with pytest.raises(ConfigError, match=r"job: a job of stages, and this file has none"):
        run_directory.check_resumable(root, learning.configure())


class Halted:
    """A job that is stopped at once."""

    lead, join_arguments = True, ()

    def __init__(self, config: Config, run: RunDirectory, place: Any, stop: Any, policy: Any, begin: Path | None):
        self.run, self.rollouts, self.learner = run, SimpleNamespace(address=""), SimpleNamespace(version=7)
        run.key.touch()

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("staged", [True, False])
def test_a_stopped_job_names_what_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: bool):
    def learn(job: Halted) -> None:
        raise Stopped("asked to stop")

    monkeypatch.setattr(launch, "Job", Halted)
    monkeypatch.setattr(launch, "learn", learn)
    monkeypatch.setattr(launch, "_build", lambda *arguments, **options: None)
    monkeypatch.setattr(launch.tokenizer, "load", lambda model: None)
    monkeypatch.setattr(launch, "prepare", lambda config, stop: run_directory.create(config))
    config = (configure if staged else learning.configure)(f"run.directory={tmp_path / 'job'}")
    with pytest.raises(Stopped, match=f"at version 7; continue with --resume {tmp_path / 'job'}$"):
        launch.run(config, seat(config, {}), None, None)  # type: ignore[arg-type]


def test_the_first_learner_chooses_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, store = learning.configure(f"run.directory={tmp_path / 'run'}", "placement.learners=2"), dist.HashStore()
    begun = run_directory.create(config).checkpoints
    monkeypatch.setattr(launch.checkpoint, "latest", lambda run: begun / "step-3")
    lead = launch.open_run(config, place(0, 2), None, str(tmp_path / "run"), store)  # type: ignore[arg-type]
    monkeypatch.delattr(launch.checkpoint, "latest")  # which reads every byte of it
    other = launch.open_run(config, place(1, 2), None, str(tmp_path / "run"), store)  # type: ignore[arg-type]
    assert lead[1] == other[1] == begun / "step-3"
    assert lead[0].path == other[0].path
    fresh = dist.HashStore()
    monkeypatch.setattr(launch, "prepare", lambda config, stop: lead[0])
    assert [launch.open_run(config, place(rank, 2), None, None, fresh)[1] for rank in (0, 1)] == [None, None]  # type: ignore[arg-type]

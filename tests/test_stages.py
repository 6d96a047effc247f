"""Stages: their configurations, their directories, and what a resume finds of them."""

from pathlib import Path

import learning
import pytest

from engine import stages
from engine.config import Config, ConfigError, load
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
    root = stages.open_root(config, None)
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
        ("domains = ['d']", "stages = []", "stages.0.stages: a stage has none of its own"),
    ],
)
def test_a_mistake_names_the_stage(old, new, line):
    with pytest.raises(ConfigError) as error:
        stages.configs(learning.configure(TWO.replace(old, new)))
    assert str(error.value).startswith(line)

"""`max_staleness = 0` is the synchronous algorithm: the whole loop of processes and its plain reference end with the
same weights, bit for bit."""

import ast
from pathlib import Path

import pytest
import synchronous
import torch
from jobs import SMALL, TESTS, Job
from safetensors.torch import load_file

from engine.config import load

ROOT = TESTS.parent
FORBIDDEN = {"tickets", "buffer", "stream", "coordinator", "coordinator_loop", "learner_loop", "actor_loop"}
SETTINGS = (
    "--run.max_staleness=0",
    "--run.steps=3",
    "--generator.ahead_groups=4",  # one message leases all groups of a step
    "--evaluation.before_after=false",
)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_without_staleness_the_loop_equals_the_plain_algorithm(tmp_path: Path, one_thread: None) -> None:
    with Job(tmp_path / f"{tmp_path.name}-sync", *SETTINGS) as job:
        summary = job.succeed()
        mismatches = [row["drift"] for row in job.records("step")]
    assert summary["max_trained_staleness"] == 0
    assert summary["groups"]["trained"] == 12
    assert max(mismatches) < 1e-6  # every step on policy
    ours, config = load_file(job.run.export / "model.safetensors"), load(SMALL, list(SETTINGS))
    reference = synchronous.train(config, tmp_path)
    assert ours.keys() == reference.keys()
    assert [name for name in ours if not torch.equal(ours[name], reference[name])] == []
    start = load_file(job.run.model / "model.safetensors")
    assert all(not torch.equal(ours[name], start[name]) for name in ours)  # and they moved


def test_reference_knows_nothing_of_the_loop() -> None:
    known, ahead = set(), {"tests.synchronous"}
    while ahead:
        known |= ahead
        ahead = {found for module in ahead for found in imports(module)} - known
    assert "engine.learner" in known
    assert sorted(name for name in known if name.rpartition(".")[2] in FORBIDDEN) == []


def imports(module: str) -> set[str]:
    """The modules of this project that `module` imports anywhere in its text."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("engine", "rewards") and exists(name)}


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()

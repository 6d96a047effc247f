"""Run directories: how they are numbered, and what is refused before anything is made or resumed."""

import errno
import socket
from pathlib import Path

import learning
import pytest

from engine import run_directory
from engine.config import Config, ConfigError, load
from engine.run_directory import (
    PINNED,
    RunDirectory,
    check_creatable,
    check_port,
    check_resumable,
    create,
    description,
    reopen,
)


def config(root: Path, *overrides: str) -> Config:
    return learning.configure(f"run.root={root}", "algorithm.penalties=[{ name = 'truncated_zero' }]", *overrides)


# ---- making ----------------------------------------------------------------------------------------------------


def test_unnamed_runs_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there"
    assert [create(config(root)).name for _ in range(3)] == ["t-001", "t-002", "t-003"]
    assert create(config(root, "run.name=t-002")).name == "t-002-001"
    (root / "t-1200").mkdir()
    (root / "t-old").mkdir()
    assert create(config(root)).name == "t-1201"


def test_number_taken_by_another_job_in_between_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(config(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])  # looked before the other made it
    assert create(config(tmp_path)).name == "t-002"


def test_fresh_run_holds_its_resolved_configuration(tmp_path: Path) -> None:
    settings = config(tmp_path, "run.seed=7")
    run = create(settings)
    assert load(run.config) == settings
    made = {"config.toml", "data.json", "stream", "checkpoints", "lock", "logs", "model"}
    assert {path.name for path in run.path.iterdir()} == made


def test_named_run_is_made_there_and_never_over_another(tmp_path: Path) -> None:
    settings = config(tmp_path, f"run.directory={tmp_path}/deep/mine")
    check_creatable(settings)
    assert create(settings).path == tmp_path / "deep" / "mine"
    for refused in (check_creatable, create):
        with pytest.raises(ConfigError, match=r"^run\.directory = '.*/deep/mine': exists; .*--resume$"):
            refused(settings)


def test_check_makes_nothing(tmp_path: Path) -> None:
    check_creatable(config(tmp_path / "runs"))
    check_creatable(config(tmp_path, f"run.directory={tmp_path}/mine"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["run.root", "run.directory"])
def test_place_where_nothing_can_be_made_is_refused(tmp_path: Path, field: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"^{field} = '.*/file/runs': cannot make anything in .*/file$"):
        check_creatable(config(tmp_path, f"{field}={tmp_path}/file/runs"))


def test_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path) -> None:
        raise ConfigError(f"{directory}: lies on nfs")

    monkeypatch.setattr(run_directory, "check_filesystem", refuse)
    with pytest.raises(ConfigError, match=f"{tmp_path}: lies on nfs"):
        check_creatable(config(tmp_path))


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "a[1]"])
def test_name_must_serve_as_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^run\.name = "):
        check_creatable(config(tmp_path, f"run.name='{name}'"))


def test_description_is_the_model_without_its_weights(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    assert [path.name for path in description(tmp_path)] == ["config.json", "tokenizer.json"]


# ---- the port --------------------------------------------------------------------------------------------------


def test_port_in_use_is_refused(tmp_path: Path) -> None:
    check_port(config(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^placement\.port = {port} on 127\.0\.0\.1: Address already in use; "):
            check_port(config(tmp_path, f"placement.port={port}"))


def test_port_that_was_in_use_a_moment_ago_is_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # first: its end of the connection now lingers
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError) as refusal:
        plain.bind(("127.0.0.1", port))
    assert refusal.value.errno == errno.EADDRINUSE
    check_port(config(tmp_path, f"placement.port={port}"))


def test_port_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^placement\.port = 70000 on 127.0.0.1: no such port; choose another, or 0"):
        check_port(config(tmp_path, "placement.port=70000"))


@pytest.mark.parametrize("bind", ["192.0.2.1", "no host"])
def test_interface_that_is_not_here_is_refused(tmp_path: Path, bind: str) -> None:
    with pytest.raises(ConfigError, match=f"^placement.bind = '{bind}': .*; must be an interface of this host"):
        check_port(config(tmp_path, f"placement.bind={bind}"))


# ---- resuming --------------------------------------------------------------------------------------------------


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^--resume = {tmp_path}: no run directory"):
        reopen(tmp_path, config(tmp_path))


def test_resume_may_change_steps_intervals_and_budgets(tmp_path: Path) -> None:
    run = RunDirectory(create(config(tmp_path)).path)  # the job that made it has ended
    changes = (
        "run.steps=99",
        "checkpoint.every=3",
        "evaluation.every=7",
        "learner.tokens_per_micro_batch=64",
        "generator.max_new_tokens=9",
        "placement.learners=2",
        "deadlines.lease_s=7.0",
    )
    changed = config(tmp_path, *changes)
    check_resumable(run.path, changed)
    assert load(run.config) == config(tmp_path)  # a check changes nothing
    assert reopen(run.path, changed).path == run.path
    assert load(run.config) == changed


@pytest.mark.parametrize(
    "override, message",
    [
        ("run.seed=1", "run.seed = 1: the run to resume has 0,"),
        ("run.max_staleness=0", "run.max_staleness = 0: the run to resume has 4,"),
        ("model.init.hidden_size=32", "model.init.hidden_size = 32: the run to resume has 16,"),
        ("domains.0.reward=math", "domains.0.reward = 'math': the run to resume has 'exact',"),
        ("algorithm.loss.name=gspo", "algorithm.loss.name = 'gspo': the run to resume has 'reinforce',"),
        ("algorithm.penalties=[]", r"algorithm.penalties = \[\]: the run to resume has \[{.*}\],"),
        ("learner.lr=0.02", "learner.lr = 0.02: the run to resume has 0.01,"),
        ("learner.betas=[0.9, 0.95]", r"learner.betas = \(0.9, 0.95\): the run to resume has \(0.9, 0.999\),"),
        ("warm_start.steps=5", "warm_start.steps = 5: the run to resume has 0,"),
    ],
)
def test_resume_refuses_another_model_data_or_algorithm(tmp_path: Path, override: str, message: str) -> None:
    run = create(config(tmp_path))
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match=f"^{message} which a resume may not change$"):
        reopen(run.path, config(tmp_path, override))
    assert run.config.read_bytes() == before


def test_resume_refuses_a_data_file_that_has_changed(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    options = ("domains.0.source=file", f"domains.0.path={data}")
    run = create(config(tmp_path, *options))
    check_resumable(run.path, config(tmp_path, *options))
    data.write_text('{"prompt": "a", "answer": "c"}\n')
    with pytest.raises(ConfigError, match=rf"^domains\.0\.path = '{data}': the file has changed since"):
        check_resumable(run.path, config(tmp_path, *options))


def test_every_pinned_field_exists(tmp_path: Path) -> None:
    for field in PINNED:
        value = config(tmp_path)
        for key in field.split("."):
            value = getattr(value, key)


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path("runs/x"))
    assert (run.path, run.name, run.ledger) == (tmp_path / "runs/x", "x", tmp_path / "runs/x/ledger.db")


def test_run_that_a_job_holds_cannot_be_resumed_by_another(tmp_path: Path) -> None:
    held = create(config(tmp_path))
    before = held.config.read_text()
    with pytest.raises(ConfigError, match="another job is running in it"):
        reopen(held.path, config(tmp_path))
    assert held.config.read_text() == before

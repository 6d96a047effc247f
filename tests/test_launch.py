"""How a learner rank begins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import launch


def test_a_collective_has_its_deadline_once_the_model_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[Any] = []

    def note(name: str, result: Any = None) -> Any:
        return lambda *arguments, **options: (done.append((name, arguments[-1])), result)[1]

    job = SimpleNamespace(lead=False, join_arguments=[], say=note("say"), finish=lambda: None, close=lambda: None)
    steps = {"join_learners": None, "_build": None, "Job": job, "limit_collectives": None, "learn": None}
    for name, result in steps.items():
        monkeypatch.setattr(launch, name, note(name, result))
    monkeypatch.setattr(launch.tokenizer, "load", lambda model: None)
    monkeypatch.setattr(launch, "open_run", lambda *arguments: (SimpleNamespace(path=tmp_path), None))
    deadlines = SimpleNamespace(prepare_s=300.0, collective_s=5.0)
    config: Any = SimpleNamespace(deadlines=deadlines, model=SimpleNamespace(init={}))
    launch.learner_rank(config, SimpleNamespace(rank=1), None, None, None)  # type: ignore[arg-type]
    assert [name for name, _ in done] == ["join_learners", "_build", "Job", "limit_collectives", "say", "learn"]
    assert dict(done)["join_learners"] == 300.0 and dict(done)["limit_collectives"] == 5.0

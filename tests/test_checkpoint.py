"""Checkpoints: whole or not there, readable by another number of ranks, and every part of the state in them."""

import random
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning
import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import checkpoint, critic, parallel
from engine.config import Config, ConfigError
from engine.learner import Learner

WITH_REFERENCE = "algorithm.kl={ name = 'k3', coefficient = 0.1 }"


def saved(run: Path, *steps: int, keep: int = 2) -> tuple[Config, Learner]:
    """A learner that trained and saved after each of `steps`."""
    config = learning.configure(f"checkpoint.keep={keep}")
    learner = learning.learner(config, run)
    for step in steps:
        learner.steps = step
        checkpoint.save(run, config, learner)
    return config, learner


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- whole or not there ----------------------------------------------------------------------------------------


def test_keeps_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 8, 9, 10)
    assert names(tmp_path) == ["step-10", "step-9"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-10"


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


def test_same_step_again_replaces(tmp_path: Path) -> None:
    config, learner = saved(tmp_path, 1)
    learner.version = 7
    checkpoint.save(tmp_path, config, learner)
    assert names(tmp_path) == ["step-1"]
    assert checkpoint.read(tmp_path / "checkpoints" / "step-1").version == 7


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-20])


def lose_shard(path: Path) -> None:
    next((path / "learner").glob("*.distcp")).unlink()


def truncate_shard(path: Path) -> None:
    shard = next((path / "learner").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    shard = next((path / "learner").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("tear", [lose_manifest, truncate_manifest, lose_shard, truncate_shard, flip_a_bit])
def test_torn_directory_is_never_chosen(tmp_path: Path, tear: Any) -> None:
    saved(tmp_path, 1, 2)
    tear(tmp_path / "checkpoints" / "step-2")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-1"


def test_unfinished_directory_is_not_seen_and_goes_with_the_next_save(tmp_path: Path) -> None:
    config, learner = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints" / "step-1", tmp_path / "checkpoints" / ".tmp-5")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-1"
    learner.steps = 2
    checkpoint.save(tmp_path, config, learner)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_crash_between_the_renames_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, learner = saved(tmp_path, 1)
    rename = Path.rename

    def crash(path: Path, target: Path) -> Path:
        if path.name.startswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, config, learner)
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.name == "step-1.old"
    assert checkpoint.load(found, learner).step == 1
    checkpoint.save(tmp_path, config, learner)
    assert names(tmp_path) == ["step-1"]


def test_files_of_others_are_sealed_in(tmp_path: Path) -> None:
    config, learner = saved(tmp_path)
    path = checkpoint.save(tmp_path, config, learner, lambda folder: (folder / "cursor.bin").write_bytes(b"7"))
    assert checkpoint.read(path).files["cursor.bin"].size == 1
    (path / "cursor.bin").write_bytes(b"8")
    assert not checkpoint.is_whole(path)


def test_a_run_whose_checkpoints_are_all_torn_is_not_begun_again(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for name in names(tmp_path):
        lose_manifest(tmp_path / "checkpoints" / name)
    with pytest.raises(ConfigError, match="none of its checkpoints is whole: step-2, step-1"):
        checkpoint.latest(tmp_path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    _, learner = saved(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-1"
    manifest = msgspec.structs.replace(checkpoint.read(path), schema_version=99)
    (path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(ConfigError, match="schema version is 99, this program reads"):
        checkpoint.load(path, learner)


# ---- the state -------------------------------------------------------------------------------------------------


def train(rank: int, run: Path, num_ranks: int, overrides: tuple[str, ...], first: int, last: int) -> Any:
    """Steps `first` to `last` on `num_ranks` ranks, from the newest checkpoint if there is one; saves at the end."""
    config = learning.configure("learner.schedule='linear'", *overrides, model="gpt_neox")
    learner = learning.learner(config, run)
    learner.mismatch(learning.groups(1))  # a forward without backward must leave nothing of the old weights behind
    found = checkpoint.latest(run)
    if found is not None:
        assert checkpoint.load(found, learner).step == first
    for step in range(first, last):
        learner.step(learning.take(config, learning.groups(3, seed=step), num_ranks))
    checkpoint.save(run, config, learner)
    counters = (learner.version, learner.steps, learner.updates, learner.bad_updates, learner.bad_in_a_row)
    return learning.parameters(learner), counters


@pytest.mark.parametrize("overrides", [(), (WITH_REFERENCE,)], ids=["plain", "reference"])
def test_one_then_two_then_one_rank_train_as_one(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    straight, counters = train(0, tmp_path / "straight", 1, overrides, 0, 4)
    resumed = tmp_path / "resumed"
    train(0, resumed, 1, overrides, 0, 1)
    learning.on_ranks(2, train, resumed, 2, overrides, 1, 3)
    weights, resumed_counters = train(0, resumed, 1, overrides, 3, 4)
    assert learning.largest_difference(straight, weights) < 1e-10
    assert resumed_counters == counters == (4, 4, 4, 0, 0)


def test_reference_is_the_run_s_own_even_where_the_model_is_another(tmp_path: Path) -> None:
    config = learning.configure(WITH_REFERENCE)
    learner = learning.learner(config, tmp_path)
    learner.step(learning.take(config, learning.groups(2)))
    path = checkpoint.save(tmp_path, config, learner)
    other = learning.learner(config, tmp_path)
    with torch.no_grad():
        for tensors in (other.state()["reference"], other.state()["model"]):
            for tensor in tensors.values():
                tensor.zero_()
    checkpoint.load(path, other)
    assert learning.largest_difference(other.state()["reference"], learner.state()["reference"]) == 0
    assert learning.largest_difference(learning.parameters(other), learning.parameters(learner)) == 0
    assert learning.largest_difference(other.state()["reference"], learner.state()["model"]) > 1e-3


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    config, learner = saved(tmp_path)
    path = checkpoint.save(tmp_path, config, learner)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    first = draw()
    draw()
    checkpoint.load(path, learner)
    assert draw() == first


# ---- export ----------------------------------------------------------------------------------------------------


def export_on_rank(rank: int, run: Path, tied: bool) -> dict[str, torch.Tensor]:
    config = learning.configure(dtype="float32", tied=tied)
    learner = learning.learner(config, run)
    checkpoint.export(learner, run / "model", run / f"export-{tied}")
    return learning.parameters(learner)


def check_export(run: Path, tied: bool, weights: dict[str, torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / f"export-{tied}")
    found = {name: tensor for name, tensor in model.state_dict().items() if name in weights}
    assert learning.largest_difference(found, weights) == 0
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert (run / f"export-{tied}" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_export_loads_in_plain_transformers(tmp_path: Path, num_ranks: int) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("the weights of the start")
    for tied in (True, False):
        work = export_on_rank
        weights = work(0, tmp_path, tied) if num_ranks == 1 else learning.on_ranks(2, work, tmp_path, tied)[0]
        check_export(tmp_path, tied, weights)


class OnDevice:
    """A tensor on a device."""

    def cpu(self) -> torch.Tensor:
        return torch.ones(1)


class Weights:
    """Five tensors made one by one, on all ranks; `most` is how many were on the device at once."""

    def __init__(self) -> None:
        self.most = 0

    def weights(self) -> Iterator[tuple[str, OnDevice]]:
        living: weakref.WeakSet[OnDevice] = weakref.WeakSet()
        for name in "abcde":
            tensor = OnDevice()
            living.add(tensor)
            self.most = max(self.most, len(living))
            yield name, tensor


@pytest.mark.parametrize(("rank", "kept"), [(0, "abcde"), (1, "")])
@pytest.mark.parametrize("export", ["policy", "critic"])
def test_an_export_needs_no_whole_model_on_any_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str, rank: int, kept: str
) -> None:
    def note(weights: dict[str, torch.Tensor], *arguments: Any, **options: Any) -> None:
        assert "".join(weights) == kept and {type(tensor) for tensor in weights.values()} == {torch.Tensor}

    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(critic, "save_file", note)
    learner: Any = Weights()
    if export == "policy":
        learner.model = SimpleNamespace(save_pretrained=lambda directory, state_dict: note(state_dict))
        checkpoint.export(learner, tmp_path, tmp_path)
    else:
        learner._backbone = SimpleNamespace(config=SimpleNamespace(to_dict=dict))
        critic.Critic.export(learner, tmp_path)
    assert learner.most == 2  # the one that is made and the one before

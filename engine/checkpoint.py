"""Checkpoints: everything a resume needs, in one directory that appears whole or not at all.

    checkpoints/step-40/
        manifest.json     schema version, counters, size and hash of every other file
        learner/          torch distributed checkpoint: model, optimiser, reference; readable by any number of ranks
        random-RANK.pt    state of each rank's random number generators
        ...               what the coordinator wrote: cursor, ledger frontier, buffered groups

It is written to `.tmp-40` and renamed once every file is on disk. A directory whose files do not match its manifest
is never chosen.
"""

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import eq
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from engine import parallel
from engine.config import Config, ConfigError
from engine.learner import Learner
from engine.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"
PIECE = 1 << 24  # bytes hashed at a time


class File(msgspec.Struct, frozen=True):
    size: int
    xxh3: str


class Manifest(msgspec.Struct, frozen=True):
    """What a checkpoint holds and where the run stood."""

    schema_version: int
    step: int
    version: int
    updates: int
    bad_updates: int
    bad_in_a_row: int
    num_ranks: int
    files: dict[str, File]


def save(
    run: Path, config: Config, learner: Learner, write_rest: Callable[[Path], object] = lambda folder: None
) -> Path:
    """Writes `run`/checkpoints/step-N and removes all but the newest `checkpoint.keep`. Collective.

    Rank 0 calls `write_rest(folder)` for the files of others before the directory is sealed.
    """
    parent = run / "checkpoints"
    folder, final = parent / f".tmp-{learner.steps}", parent / f"step-{learner.steps}"
    if parallel.rank() == 0:
        for torn in parent.glob(".tmp-*"):
            shutil.rmtree(torn)
        folder.mkdir(parents=True)
        write_rest(folder)
    parallel.barrier()
    with _quiet():
        save_shards(learner.state(), checkpoint_id=folder / "learner", no_dist=parallel.num_ranks() == 1)
    torch.save(_random_state(), folder / f"random-{parallel.rank()}.pt")
    parallel.barrier()
    if parallel.rank() == 0:
        (folder / MANIFEST).write_bytes(msgspec.json.encode(_manifest(learner, folder)))
        _publish(folder, final)
        for old in _newest_first(parent)[config.checkpoint.keep :]:
            shutil.rmtree(old)
    parallel.barrier()
    return final


def load(path: Path, learner: Learner) -> Manifest:
    """Brings `learner` to the state in `path`, a directory that `latest` chose. Collective.

    Any number of ranks reads what any number wrote; the random states are those of the ranks that were there. Raises
    `ConfigError` for a checkpoint of another schema.
    """
    manifest = read(path)
    if manifest.schema_version != SCHEMA_VERSION:
        raise ConfigError(
            f"--resume = {path}: its schema version is {manifest.schema_version}, this program reads {SCHEMA_VERSION}"
        )
    state = learner.state()
    with _quiet():
        load_shards(state, checkpoint_id=path / "learner", no_dist=parallel.num_ranks() == 1)
    learner.load(state)
    learner.steps, learner.version, learner.updates = manifest.step, manifest.version, manifest.updates
    learner.bad_updates, learner.bad_in_a_row = manifest.bad_updates, manifest.bad_in_a_row
    saved = path / f"random-{parallel.rank()}.pt"
    if saved.exists():
        _restore_random_state(torch.load(saved))
    return manifest


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of `run`; None where none was made yet.

    Raises `ConfigError` where there are some and none is whole: to begin again would undo the run silently.
    """
    made = _newest_first(run / "checkpoints")
    whole = next((path for path in made if is_whole(path)), None)
    if made and whole is None:
        torn = ", ".join(path.name for path in made)
        raise ConfigError(f"--resume = {run}: none of its checkpoints is whole: {torn}")
    return whole


def read(path: Path) -> Manifest:
    """The manifest of the checkpoint in `path`."""
    return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)


def is_whole(path: Path) -> bool:
    """Whether every file that the manifest in `path` names is there with its size and hash."""
    try:
        manifest = read(path)
        with ThreadPoolExecutor() as pool:
            found = pool.map(_file, (path / name for name in manifest.files))
            return all(map(eq, found, manifest.files.values()))
    except (OSError, msgspec.DecodeError):
        return False


def export(learner: Learner, source: Path, directory: Path) -> None:
    """Writes the policy to `directory` in Hugging Face format, with the tokenizer's files out of `source` beside it.
    Collective."""
    weights = parallel.of_lead_alone(learner.weights())
    if parallel.rank() == 0:
        learner.model.save_pretrained(directory, state_dict=weights)
        for path in source.iterdir():
            if "safetensors" not in path.name and not (directory / path.name).exists():
                shutil.copyfile(path, directory / path.name)
    parallel.barrier()


# ---- parts -----------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process saves or loads alone, which is what one rank wants."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _manifest(learner: Learner, folder: Path) -> Manifest:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing leaves the GIL, and the other ranks wait
        known = dict(zip((str(path.relative_to(folder)) for path in files), pool.map(_file, files), strict=True))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        step=learner.steps,
        version=learner.version,
        updates=learner.updates,
        bad_updates=learner.bad_updates,
        bad_in_a_row=learner.bad_in_a_row,
        num_ranks=parallel.num_ranks(),
        files=known,
    )


def _file(path: Path) -> File:
    hasher = xxhash.xxh3_64()
    with path.open("rb") as content:
        while piece := content.read(PIECE):
            hasher.update(piece)
    return File(path.stat().st_size, hasher.hexdigest())


def _publish(folder: Path, final: Path) -> None:
    """Forces `folder` to disk and renames it to `final`; what stood there stays a candidate until then."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(_sync, (*folder.rglob("*"), folder)))
    displaced = final.with_name(f"{final.name}.old")
    shutil.rmtree(displaced, ignore_errors=True)
    if final.exists():
        final.rename(displaced)
    folder.rename(final)
    _sync(final.parent)
    shutil.rmtree(displaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _newest_first(parent: Path) -> list[Path]:
    """The directories named step-N, and step-N.old after its step-N."""

    def order(path: Path) -> tuple[int, bool]:
        return int(path.stem.removeprefix("step-")), path.suffix == ""

    return sorted(parent.glob("step-*"), key=order, reverse=True)


def _random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, as types that `torch.load` accepts unseen."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])

"""The directory of one run: what lies where, how it is made, and what a resume may change."""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from engine.config import Config, ConfigError, load, to_toml
from engine.ledger import check_filesystem

# A resumed run must agree in these; steps, intervals, budgets, placement and deadlines may change.
PINNED = (
    "run.seed",
    "run.groups_per_step",
    "run.group_size",
    "run.max_staleness",
    "model",
    "warm_start",
    "domains",
    "curriculum",
    "schedule",
    "algorithm",
    "critic",
    "generator.temperature",
    "generator.target_entropy",
    "generator.stop",
    "learner.lr",
    "learner.betas",
    "learner.eps",
    "learner.weight_decay",
    "learner.clip_norm",
    "learner.schedule",
    "learner.warmup_steps",
    "learner.updates_per_step",
)


class RunDirectory:
    """Paths of a run. `config.toml` as resolved, `data.json` (digests of the user's files), `join.key` (what a
    generator needs to join, while the job runs), `ledger.db`, `metrics.jsonl`, `stream/`, `checkpoints/`, `logs/`,
    `model/` (tokenizer and model configuration), `critic/` (as it was when it had been trained alone), `export/` and at
    the end `summary.json`."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.config = self.path / "config.toml"
        self.data = self.path / "data.json"
        self.key = self.path / "join.key"
        self.ledger = self.path / "ledger.db"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.pass_rates = self.path / "pass_rates.jsonl"
        self.stream = self.path / "stream"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.model = self.path / "model"
        self.export = self.path / "export"
        self.critic = self.path / "critic"
        self.debug = self.path / "debug"
        self.tensorboard = self.path / "tensorboard"

    @property
    def name(self) -> str:
        return self.path.name

    def occupy(self) -> None:
        """Holds the run for this process as long as it lives. Raises `ConfigError` where another job holds it."""
        self._lock = (self.path / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--resume = {self.path}: another job is running in it") from error


def description(model: Path) -> list[Path]:
    """The small files of a model's directory: tokenizer and configuration, without the weights."""
    return [path for path in sorted(model.iterdir()) if path.is_file() and path.suffix != ".safetensors"]


def create(config: Config, write_model: Callable[[Path], None] = lambda folder: None) -> RunDirectory:
    """Makes the run's directory: the named one, which must not exist, or the next free number below `run.root`.

    `write_model` fills its model/. config.toml comes last: a directory without it is no run to resume.
    """
    run = new_directory(config)
    for folder in (run.stream, run.checkpoints, run.logs, run.model):
        folder.mkdir()
    run.occupy()
    write_model(run.model)
    run.data.write_bytes(msgspec.json.encode(data_digests(config)))
    run.config.write_text(to_toml(config))
    return run


def new_directory(config: Config) -> RunDirectory:
    """The named directory, which must not exist, or the next free number below `run.root`; empty."""
    if not config.run.directory:
        return _numbered(Path(config.run.root), config.run.name)
    run = RunDirectory(Path(config.run.directory))
    try:
        run.path.mkdir(parents=True)
    except FileExistsError as error:
        raise _exists(config) from error
    return run


def data_digests(config: Config) -> dict[str, str]:
    """xxh3-64 of every file of prompts, by the field that names it."""
    return {
        f"domains.{number}.{field}": xxhash.xxh3_64_hexdigest(Path(path).read_bytes())
        for number, domain in enumerate(config.domains)
        for field, path in (("path", domain.path), ("eval_path", domain.eval_path))
        if path
    }


def _numbered(root: Path, name: str) -> RunDirectory:
    root.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix(f"{name}-") for path in root.glob(f"{name}-*")]
    number = 1 + max((int(text) for text in taken if text.isdigit()), default=0)
    while True:
        run = RunDirectory(root / f"{name}-{number:03d}")
        try:
            run.path.mkdir()
        except FileExistsError:  # another job took the number in between
            number += 1
        else:
            return run


def _exists(config: Config) -> ConfigError:
    return ConfigError(
        f"run.directory = {config.run.directory!r}: exists; name another, leave it empty for a numbered one, or "
        "continue it with --resume"
    )


def check_creatable(config: Config) -> None:
    """Raises `ConfigError` where `create` would fail or the ledger could not live."""
    if not re.fullmatch(r"\w[\w.-]*", config.run.name):
        raise ConfigError(f"run.name = {config.run.name!r}: must be letters, digits, '.', '_' and '-'")
    field = "run.directory" if config.run.directory else "run.root"
    path = Path(config.run.directory or config.run.root).absolute()
    if config.run.directory and path.exists():
        raise _exists(config)
    _check_writable(field, config.run.directory or config.run.root)
    check_filesystem(path)


def _check_writable(field: str, directory: str) -> None:
    path = Path(directory).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{field} = {directory!r}: cannot make anything in {nearest}")


def check_paths(config: Config) -> None:
    """Raises `ConfigError` for a directory that would be needed later and cannot be made, or a file that is missing."""
    needed = {"warm_start.cache": config.warm_start.cache if config.warm_start.steps else ""}
    for field, directory in (needed | {"weights.directory": config.weights.directory}).items():
        if directory:
            _check_writable(field, directory)
    for number, path in enumerate(config.curriculum.rates):
        if not Path(path).is_file():
            raise ConfigError(f"curriculum.rates.{number} = {path!r}: no such file")


def check_port(config: Config) -> None:
    """Raises `ConfigError` where `placement.port` cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else connections just closed hold it for a minute
        try:
            probe.bind((config.placement.bind, config.placement.port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", "no such port")
            if isinstance(error, socket.gaierror) or getattr(error, "errno", 0) == errno.EADDRNOTAVAIL:
                allowed = "must be an interface of this host, or 0.0.0.0 for all"
                raise ConfigError(f"placement.bind = {config.placement.bind!r}: {why}; {allowed}") from error
            place = f"placement.port = {config.placement.port} on {config.placement.bind}"
            raise ConfigError(f"{place}: {why}; choose another, or 0 for a free one") from error


def check_is_run(run: RunDirectory) -> None:
    """Raises `ConfigError` where there is no configuration, and names the runs below, if there are any; and where it
    can only be read."""
    if not run.config.exists():
        below = sorted(config.parent.name for config in run.path.glob("*/config.toml"))
        near = f"; in it are {', '.join(below[-5:])}" if below else ""
        raise ConfigError(f"--resume = {run.path}: no run directory (it has no config.toml){near}")
    _check_writable("--resume", str(run.path))


def check_resumable(path: Path, config: Config) -> None:
    """Raises `ConfigError` where `path` is no run, or where `config` differs from it in what is `PINNED`."""
    run = RunDirectory(path)
    check_is_run(run)
    old, new = msgspec.to_builtins(load(run.config)), msgspec.to_builtins(config)
    if old["stages"]:
        raise ConfigError(f"--resume = {path}: a job of stages, and this file has none")
    for field in PINNED:
        before, now = _at(old, field), _at(new, field)
        if before != now:
            name, was, is_now = _first_difference(field, before, now)
            raise ConfigError(f"{name} = {is_now!r}: the run to resume has {was!r}, which a resume may not change")
    kept = msgspec.json.decode(run.data.read_bytes(), type=dict[str, str])
    for field, digest in data_digests(config).items():
        if kept[field] != digest:
            path = _at(new, field)
            raise ConfigError(f"{field} = {path!r}: the file has changed since the run to resume began")


def reopen(path: Path, config: Config) -> RunDirectory:
    """The run to resume, now with `config`. Raises `ConfigError` as `check_resumable` does."""
    check_resumable(path, config)
    run = RunDirectory(path)
    run.occupy()
    run.config.write_text(to_toml(config))
    return run


def _at(table: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        table = table[int(key) if isinstance(table, list) else key]
    return table


def _first_difference(field: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The deepest field in which two values differ first."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _first_difference(f"{field}.{key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, now) in enumerate(zip(old, new, strict=True)):
            if before != now:
                return _first_difference(f"{field}.{number}", before, now)
    return field, old, new

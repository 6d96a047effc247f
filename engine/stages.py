"""Several runs in one file: [[stages]] tables, each laid over the rest and begun with the weights of the one before.

    [[stages]]
    name = "math-8k"
    domains = ["math"]                     # of the file's domains these; all of them where it says nothing
    run = { steps = 1000, group_size = 8 }
    generator = { max_new_tokens = 8192 }

Every stage is an ordinary run in a directory of its own below the file's run directory, NUMBER-NAME, and what it leaves
in its export/ is the next one's model. So a stage may be resumed, audited, replayed and reported like any run.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine.config import Config, ConfigError, load, merge, parse, to_toml
from engine.run_directory import RunDirectory, check_is_run, new_directory


def configs(config: Config, root: Path = Path()) -> list[Config]:
    """The configuration of every stage, in their order, of the job in `root`; `config` alone where it has none.

    Raises `ConfigError`, which names the stage, for a table that does not fit.
    """
    return list(_configs(config, root)) if config.stages else [config]


def directories(config: Config, root: Path) -> list[Path]:
    return [root / f"{number}-{stage['name']}" for number, stage in enumerate(config.stages, 1)]


def open_root(config: Config, resume: str | None) -> RunDirectory:
    """The directory of the whole job, new or the one to resume, held as long as what this returns lives. It keeps the
    whole file."""
    run = RunDirectory(Path(resume)) if resume else new_directory(config)
    run.occupy()
    run.config.write_text(to_toml(config))
    return run


def num_done(config: Config, root: Path) -> int:
    """How many stages have come to their end."""
    done = [RunDirectory(folder).summary.exists() for folder in directories(config, root)]
    return [*done, False].index(False)


def to_resume(stage: Config) -> str | None:
    """The directory of `stage`, where it began; one that was left before it had a configuration is removed. For the
    holder of the root alone: elsewhere it may be one that is being made."""
    run = RunDirectory(Path(stage.run.directory))
    if run.config.exists():
        return str(run.path)
    shutil.rmtree(run.path, ignore_errors=True)
    return None


def check_resumable(path: Path, config: Config) -> None:
    """Raises `ConfigError` where `path` is no job of stages, or one whose begun stages have other names."""
    run = RunDirectory(path)
    check_is_run(run)
    if not load(run.config).stages:
        raise ConfigError(f"--resume = {path}: a run without stages; name the directory of the whole job")
    names = [folder.name for folder in directories(config, path)]
    begun = sorted(
        (folder.parent.name for folder in path.glob("*/config.toml")), key=lambda name: int(name.split("-")[0])
    )
    if begun != names[: len(begun)]:
        raise ConfigError(f"stages: the job to resume began with {', '.join(begun)}, not {', '.join(names)}")


def _configs(config: Config, root: Path) -> Iterator[Config]:
    names = [_name(number, stage) for number, stage in enumerate(config.stages)]
    base = msgspec.to_builtins(msgspec.structs.replace(config, stages=[]))
    folders = directories(config, root)
    for number, (stage, name) in enumerate(zip(config.stages, names, strict=True)):
        changes = {key: value for key, value in stage.items() if key != "name"}
        table = merge(base, changes | {"domains": _domains(number, base["domains"], stage.get("domains"))})
        table = merge(table, {"run": {"name": f"{config.run.name}-{name}", "directory": str(folders[number])}})
        table["run"]["seed"] += number  # or every stage would begin with the same prompts
        try:
            parsed = parse(table)
        except ConfigError as error:
            raise ConfigError(f"stages.{number}: {error}") from error
        if not parsed.checkpoint.export and number + 1 < len(names):
            raise ConfigError(f"stages.{number}: checkpoint.export = false: the next stage begins with what it exports")
        yield _continued(parsed, folders[:number]) if number else parsed


def _continued(config: Config, before: list[Path]) -> Config:
    """`config` with the newest model, and the pass rates, that the runs in `before` leave."""
    runs = [RunDirectory(folder) for folder in before]
    rates = [*config.curriculum.rates, *(str(run.pass_rates) for run in runs)]
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, path=str(runs[-1].export), init={}),
        warm_start=msgspec.structs.replace(config.warm_start, steps=0),
        curriculum=msgspec.structs.replace(config.curriculum, rates=rates),
    )


def _name(number: int, stage: dict[str, Any]) -> str:
    name = stage.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"stages.{number}.name = {name!r}: must be letters, digits, '.', '_' and '-'")
    if "stages" in stage:
        raise ConfigError(f"stages.{number}.stages: a stage has none of its own")
    return name


def _domains(number: int, domains: list[dict[str, Any]], wanted: Any) -> list[dict[str, Any]]:
    if wanted is None:
        return domains
    by_name = {domain["name"]: domain for domain in domains}
    for name in wanted if isinstance(wanted, list) else [wanted]:
        if name not in by_name:
            raise ConfigError(f"stages.{number}.domains = {wanted!r}: must be a list of {', '.join(by_name)}")
    return [by_name[name] for name in wanted]

"""The entry: torchrun engine/launch.py CONFIG [--a.b=c ...] [--resume RUN_DIR] [--dry-run]

Checks everything, gives this rank its role and runs it. Without torchrun it is the only rank. Exit code 0: done; 2: a
mistake of the user, told in one line; 130: stopped as asked; 1: anything else. The last two leave a run to resume.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else engine/ itself, shadowing standard modules
    sys.path.append(os.getcwd())  # the user's own rewards and data

from engine import command

if __name__ == "__main__":
    command.check(sys.argv[1:])  # here, for the imports below take seconds

import shlex

import msgspec
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from engine import checkpoint, keys, plan, stages, tokenizer, warm_start
from engine.algorithms.method import compose
from engine.config import Config, ConfigError, Model
from engine.generators.table import check_generator
from engine.learner_loop import Job, Mismatch, learn
from engine.metrics import check_tracking
from engine.model import build, check_isolation, describe
from engine.optimizer import NonFinite
from engine.origin import check_model
from engine.placement import Seat, check_devices, check_route, join_learners, limit_collectives, rendezvous, seat
from engine.process import ProcessDied, Stopped, StopSignal, Supervisor, answer_with_stacks, die_with_parent
from engine.prompts import Prompts
from engine.rollouts import Hopeless
from engine.run_directory import RunDirectory, check_creatable, check_paths, check_port, check_resumable, create, reopen
from engine.schedule import Schedule
from engine.scorer import check_judgeable, check_rewards
from engine.scores import shape_by
from engine.stream import Silence
from engine.weights import WeightsError

# In the ranks' store, which torchrun does not encrypt.
RUN_KEY, CHECKPOINT_KEY, STAGE_KEY = "leeway/run", "leeway/checkpoint", "leeway/stage"
ADDRESS_KEY, JOIN_KEY, DONE_KEY = "leeway/address", "leeway/key", "leeway/done"


def main(argv: list[str]) -> int:
    lead = command.leads()
    try:
        arguments, config = command.read(argv)
        place = seat(config)
        if lead:
            check(config, place, arguments.resume, dry_run=arguments.dry_run)
    except ConfigError as error:
        if lead:
            command.tell(error)
        return 2
    if arguments.dry_run:
        return 0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    torch.set_num_threads(place.threads)
    transformers_logging.disable_progress_bar()
    stop = StopSignal(config.deadlines.stop_s)
    try:
        run(config, place, stop, arguments.resume)
        return 0
    except ConfigError as error:
        command.tell(error)
        return 2
    except (ProcessDied, Silence, Hopeless, Mismatch, NonFinite, WeightsError, dist.DistError) as error:
        command.tell(error)
        return 1
    except Stopped as error:
        if lead:
            command.tell(error)
        return 130


def check(config: Config, place: Seat, resume: str | None, *, dry_run: bool) -> None:
    """All that can be known before anything is made; on rank 0 alone. Raises `ConfigError`."""
    tokens = tokenizer.load(config.model)
    if config.critic.path:
        check_model("critic.path", config.critic.path)
    check_devices(config, place)
    check_route(config, place)
    check_generator(config)
    check_port(config)
    check_paths(config)
    if resume is None:
        check_creatable(config)
    elif config.stages:
        stages.check_resumable(Path(resume), config)
    else:
        check_resumable(Path(resume), config)
    runs = stages.configs(config)
    prompts = [check_method(each, tokens) for each in runs]
    if dry_run:
        policy = _build(config, config.model, tokens)
        plans = [plan.describe(each, place, policy, its) for each, its in zip(runs, prompts, strict=True)]
        print("\n\n".join([plan.overview(runs), *plans] if config.stages else plans))


def check_method(config: Config, tokens: PreTrainedTokenizerBase) -> Prompts:
    """What differs from stage to stage; its prompts. Raises `ConfigError`."""
    for entry in Schedule(config).configs:
        compose(entry.algorithm)
        shape_by(entry.algorithm)
    rewards = check_rewards(config)
    check_tracking(config)
    prompts = Prompts(config, tokens)
    for doubt in check_judgeable(config, rewards, prompts):
        command.tell(doubt)
    return prompts


def _build(config: Config, source: Model, tokens: PreTrainedTokenizerBase, *, empty: bool = False) -> PreTrainedModel:
    """The model that `source` (a [model] table) names, checked for leaks between packed sequences unless `empty`."""
    policy = build(source, seed=config.run.seed, empty=empty, **tokenizer.vocabulary(tokens))
    if not empty:
        check_isolation(policy)
    return policy


def prepare(config: Config, stop: StopSignal) -> RunDirectory:
    """A fresh run's directory with its tokenizer and the description of its model, and for a model made here its
    weights too, warmed up where the configuration says so."""
    tokens = tokenizer.load(config.model)
    policy = _build(config, config.model, tokens)
    if config.warm_start.steps:
        warm_start.warm_start(config, policy, tokens, stop)

    def write_model(folder: Path) -> None:
        for name, content in {**tokenizer.files(tokens), **describe(policy)}.items():
            (folder / name).write_bytes(content)
        if config.model.init:
            policy.save_pretrained(folder)

    return create(config, write_model)


def run(config: Config, place: Seat, stop: StopSignal, resume: str | None) -> None:
    """This rank's part of the job: of its one run, or of its stages one after the other."""
    store = rendezvous(place, config.deadlines.prepare_s)

    def run_rank(config: Config, resume: str | None, store: dist.Store | None, root: Path | None = None) -> None:
        if place.role == "learner":
            learner_rank(config, place, stop, resume, store, root)
        else:
            assert store is not None
            generator_rank(config, place, stop, store)

    if not config.stages:
        run_rank(config, resume, store)
        return
    if place.rank == 0:
        held = stages.open_root(config, resume)  # until this function returns
        root, first = held.path, stages.num_done(config, held.path)
        if store is not None:
            store.set(RUN_KEY, str(root))
            store.set(STAGE_KEY, str(first))
    else:
        assert store is not None
        root, first = Path(store.get(RUN_KEY).decode()), int(store.get(STAGE_KEY))
    for number, stage in list(enumerate(stages.configs(config, root)))[first:]:
        begun = None
        if place.rank == 0:
            print(f"stage {number + 1} of {len(config.stages)}: {stage.run.name}", flush=True)
            begun = stages.to_resume(stage)
        its_store = None if store is None else dist.PrefixStore(f"stage-{number}", store)
        run_rank(stage, begun, its_store, root)


def open_run(
    config: Config, place: Seat, stop: StopSignal, resume: str | None, store: dist.Store | None
) -> tuple[RunDirectory, Path | None]:
    """A learner rank's run, and the checkpoint to continue from. Rank 0 makes or opens the one, and chooses the other
    for all: to choose is to read the whole of it."""
    if place.rank != 0:
        assert store is not None
        run, name = RunDirectory(Path(store.get(RUN_KEY).decode())), store.get(CHECKPOINT_KEY).decode()
        return run, run.checkpoints / name if name else None
    run = prepare(config, stop) if resume is None else reopen(Path(resume), config)
    begin = None if resume is None else checkpoint.latest(run.path)
    if store is not None:
        store.set(RUN_KEY, str(run.path))
        store.set(CHECKPOINT_KEY, "" if begin is None else begin.name)
    return run, begin


def learner_rank(
    config: Config,
    place: Seat,
    stop: StopSignal,
    resume: str | None,
    store: dist.Store | None,
    root: Path | None = None,
) -> None:
    """Learns one run, alone or below `root` as one stage of many. `resume` is rank 0's alone."""
    run, begin = open_run(config, place, stop, resume, store)
    join_learners(place, store, config.deadlines.prepare_s)
    source = msgspec.structs.replace(config.model, path=str(run.model), init={}) if config.model.init else config.model
    policy = _build(config, source, tokenizer.load(source), empty=place.rank > 0)  # rank 0 gives the others theirs
    job = Job(config, run, place, stop, policy, begin)
    try:
        limit_collectives(config.deadlines.collective_s)  # up to here the others wait for what rank 0 alone reads
        if store is not None and job.lead:
            store.set(JOIN_KEY, "" if config.placement.trusted else run.key.read_text())
            store.set(ADDRESS_KEY, job.rollouts.address)
        job.say(f"other generators join by python -m engine.actor_loop {shlex.join(job.join_arguments)}")
        learn(job)
        job.finish()
        if store is not None and job.lead:
            store.set(DONE_KEY, "")
    except Stopped as error:
        again = f"--resume {shlex.quote(str(root or run.path))}"
        raise Stopped(f"{error} at version {job.learner.version}; continue with {again}") from error
    finally:
        job.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def generator_rank(config: Config, place: Seat, stop: StopSignal, store: dist.Store) -> None:
    """Supervises one generator until the run ends."""
    address = store.get(ADDRESS_KEY).decode()
    os.environ[keys.VARIABLE] = store.get(JOIN_KEY).decode()
    run = RunDirectory(Path(store.get(RUN_KEY).decode()))
    run.logs.mkdir(parents=True, exist_ok=True)  # on a host that does not share the run's file system
    name = f"generator-rank-{place.rank}"
    arguments, log = ["--join", address, "--name", name], run.logs / f"{name}.log"
    start_s = config.deadlines.start_s
    supervisor = Supervisor(name, "engine.actor_loop", arguments, log, place.child_threads, place.child_gpus, start_s)
    supervisor.start()
    try:
        while not supervisor.wait(stop, config.deadlines.lease_s):
            store.check([DONE_KEY])  # raises where the store, and so the job, has gone
    finally:
        supervisor.stop(1.0)
    if supervisor.gave_up and not store.check([DONE_KEY]):
        raise supervisor.error()


if __name__ == "__main__":
    answer_with_stacks()
    sys.exit(main(sys.argv[1:]))

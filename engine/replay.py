"""Repeats the learner's updates from the record and compares the weights of every version with those published.

    python -m engine.replay RUN [--steps N]

Equal to the bit with the same numbers of ranks and threads and the same kind of processor; a run of several learner
ranks is replayed by as many: torchrun --nproc-per-node N -m engine.replay RUN. Where the generator's dtype is narrower
than the parameters', it is the narrow weights that are compared. Exit code 0: all versions agree; 1: the first that
does not is named; 2: no run to replay.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from engine import tokenizer
from engine.algorithms.method import Method, compose
from engine.config import Config, ConfigError, load, load_text
from engine.history import Stretch, history, lineage
from engine.learner import Learner
from engine.learner_loop import prepare
from engine.model import build
from engine.placement import Seat, join_learners, rendezvous, seat
from engine.policy import manifest_of, named_tensors
from engine.run_directory import RunDirectory
from engine.schedule import Schedule
from engine.schema import Ack, Group, Published, Result, Trained
from engine.scores import scheduled_shape
from engine.weights import publish


class Replay:
    """A learner led through the surviving history."""

    def __init__(self, run: RunDirectory, place: Seat):
        self._run, self._place = run, place
        self._learner: Learner | None = None
        self._groups: dict[int, Group] = {}  # accepted, not yet trained

    def versions(self, stretches: list[Stretch]) -> Iterator[tuple[int, str, str]]:
        """(version, digest published, digest now) of every publish, in order."""
        records = (record for stretch in stretches for record in history(stretch))
        trained = {group_id for record in records if isinstance(record, Trained) for group_id in record.group_ids}
        for stretch in stretches:
            config = load_text(stretch.began.config)
            method, schedule, shape = compose(config.algorithm), Schedule(config), scheduled_shape(config)
            learner = self._learner = self._continue(config, method)
            results: dict[tuple[int, int], Group] = {}
            for record in history(stretch):
                if isinstance(record, Result) and record.group.kind == "train":
                    results[record.group.group_id, record.group.attempt] = record.group
                elif isinstance(record, Ack) and record.kind == "train":
                    group = results.pop((record.group_id, record.attempt))
                    if not record.reason and record.group_id in trained:  # else it would be kept to the end
                        self._groups[record.group_id] = group
                elif isinstance(record, Trained):
                    groups = [self._groups.pop(group_id) for group_id in record.group_ids]
                    learner.step(prepare(schedule, method, shape, groups, learner.version))
                elif isinstance(record, Published):
                    yield record.version, record.digest, digest(learner, config)

    def _continue(self, config: Config, method: Method) -> Learner:
        """The learner of the next incarnation, in the state that the one before had."""
        model = config.model
        source = msgspec.structs.replace(model, path=str(self._run.model), init={}) if model.init else model
        tokens = tokenizer.load(source)
        policy = build(source, seed=config.run.seed, **tokenizer.vocabulary(tokens))
        learner = Learner(config, policy, method, device=self._place.device, directory=self._run.debug / "replay")
        if (before := self._learner) is not None:
            learner.load(before.state())
            for count in ("version", "steps", "updates", "bad_updates", "bad_in_a_row"):
                setattr(learner, count, getattr(before, count))
        return learner


def digest(learner: Learner, config: Config) -> str:
    """What a publish of the weights would give."""
    return publish.digest(manifest_of(learner.model, config), named_tensors(learner.model))


def replay(run: RunDirectory, place: Seat, num_steps: int | None = None) -> tuple[int, str]:
    """(versions that agree, what the first one that does not is about), the latter empty where there is none."""
    last = -1
    for version, published, now in Replay(run, place).versions(lineage(run.stream)):
        if num_steps is not None and version > num_steps:
            break
        if published != now:
            return last + 1, f"version {version} differs: {published} was published, the record gives {now}"
        last = version
    return last + 1, ""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.replay", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--steps", type=int, help="replay so many steps; default: all")
    arguments = parser.parse_args(argv)
    run = RunDirectory(arguments.run)
    transformers_logging.disable_progress_bar()
    try:
        config = load(run.config)
        alone = msgspec.structs.replace(config.placement, learners=int(os.environ.get("WORLD_SIZE", 1)))
        place = seat(msgspec.structs.replace(config, placement=alone))
        torch.set_num_threads(place.threads)
        join_learners(place, rendezvous(place, config.deadlines.start_s), config.deadlines.collective_s)
        agreeing, difference = replay(run, place, arguments.steps)
    except (ConfigError, ValueError) as error:
        print(f"leeway: {error}", file=sys.stderr)
        return 2
    if place.rank == 0:
        print(difference or f"versions 0 to {agreeing - 1}: equal to the bit")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

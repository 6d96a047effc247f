"""Every process killed in every phase of a real job, which is resumed until it ends as usual; then the audit.

A chain is one job and a seeded list of kills that strike one after the other, most of which end the job: it is then
resumed from its last checkpoint. The chains run side by side. `make thorough` kills every process in every phase, else
each phase sees one kill and each process dies once or twice.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from extent import THOROUGH

from engine.audit import audit
from engine.config import load
from engine.ledger import Ledger
from engine.placement import seat
from engine.replay import replay
from engine.run_directory import RunDirectory

TESTS = Path(__file__).resolve().parent
LAUNCH = TESTS.parent / "engine" / "launch.py"
PROCESSES = ("launcher", "learner", "coordinator", "generator", "reward worker")
PHASES = ("leasing", "generating", "uploading", "taking", "training", "publishing", "checkpointing")
ENDS_JOB = ("launcher", "learner", "coordinator")

# (process, phase) -> the call in whose midst the process dies: its own where it takes part in the phase, else that of
# the process which does.
TABLE = {
    ("launcher", "leasing"): "engine.coordinator:Coordinator._grant",
    ("learner", "leasing"): "engine.coordinator:Coordinator._grant",
    ("coordinator", "leasing"): "engine.coordinator:Coordinator._grant",
    ("generator", "leasing"): "engine.generators.embedded:Embedded.submit",
    ("reward worker", "leasing"): "engine.coordinator:Coordinator._grant",
    ("launcher", "generating"): "engine.generators.embedded:Embedded.poll",
    ("learner", "generating"): "engine.generators.embedded:Embedded.poll",
    ("coordinator", "generating"): "engine.generators.embedded:Embedded.poll",
    ("generator", "generating"): "engine.generators.embedded:Embedded.poll",
    ("reward worker", "generating"): "engine.generators.embedded:Embedded.poll",
    ("launcher", "uploading"): "engine.coordinator:Coordinator.arrived",
    ("learner", "uploading"): "engine.coordinator:Coordinator.arrived",
    ("coordinator", "uploading"): "engine.coordinator:Coordinator.arrived",
    ("generator", "uploading"): "engine.stream:Link.send@Result",
    ("reward worker", "uploading"): "chaos_task:reward",
    ("launcher", "taking"): "engine.rollouts:Rollouts.take",
    ("learner", "taking"): "engine.rollouts:Rollouts.take",
    ("coordinator", "taking"): "engine.coordinator:Coordinator.take",
    ("generator", "taking"): "engine.rollouts:Rollouts.take",
    ("reward worker", "taking"): "engine.rollouts:Rollouts.take",
    ("launcher", "training"): "engine.learner:Learner.step",
    ("learner", "training"): "engine.learner:Learner.step",
    ("coordinator", "training"): "engine.coordinator:Coordinator.trained",
    ("generator", "training"): "engine.learner:Learner.step",
    ("reward worker", "training"): "engine.learner:Learner.step",
    ("launcher", "publishing"): "engine.weights.publish:Publisher.publish",
    ("learner", "publishing"): "engine.weights.segment:Segment.commit",
    ("coordinator", "publishing"): "engine.coordinator:Coordinator.published",
    ("generator", "publishing"): "engine.weights.subscribe:Subscriber.stage",
    ("reward worker", "publishing"): "engine.weights.publish:Publisher.publish",
    ("launcher", "checkpointing"): "engine.checkpoint:_publish",
    ("learner", "checkpointing"): "engine.checkpoint:_publish",
    ("coordinator", "checkpointing"): "engine.coordinator:Coordinator.snapshot",
    ("generator", "checkpointing"): "engine.checkpoint:_publish",
    ("reward worker", "checkpointing"): "engine.checkpoint:_publish",
}
LATEST_CALL = {  # the call that is hit is drawn from 1 to this
    "leasing": 8,
    "generating": 24,
    "uploading": 8,
    "taking": 2,
    "training": 2,
    "publishing": 2,
    "checkpointing": 1,
}

# The learner dies checkpointing, the coordinator publishing: where the most is at stake.
DIAGONAL = {(PROCESSES[(2 - number) % len(PROCESSES)], phase) for number, phase in enumerate(PHASES)}
CHAINS, STEPS = (3, 30) if THOROUGH else (1, 18)
SEED = 0
LAUNCH_S = 600.0  # the longest that one launch may take
ORPHAN_S = 30.0  # after the launcher's end, until no process of the job is left
CONFIG = f"""
[run]
name = "chaos"
steps = {STEPS}
groups_per_step = 4
group_size = 3
max_staleness = 2
[model]
context = 32
[model.init]
model_type = "qwen3"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
tie_word_embeddings = true
[model.tokenizer]
alphabet = "0123456789="
[[domains]]
name = "noise"
source = "callable"
task = "chaos_task:draw"
reward = "chaos_task:reward"
[generator]
max_new_tokens = 8
slots = 12
threads = 1
[learner]
tokens_per_micro_batch = 512
lr = 1e-3
threads = 1
[checkpoint]
every = 2
export = false
[evaluation]
before_after = false
[tracking]
tensorboard = false
progress = false
[deadlines]
start_s = 300
heartbeat_s = 0.5
lease_s = 10
group_s = 30
take_s = 300
publish_s = 30
evaluate_s = 300
reward_s = 5
"""


class Kill(NamedTuple):
    process: str
    phase: str
    count: int
    moment: str

    def __str__(self) -> str:
        """As tests/faults reads it."""
        return f"{TABLE[self.process, self.phase]}:{self.count}:{self.moment}:{self.process}"


def plan(seed: int, thorough: bool = THOROUGH) -> list[list[Kill]]:
    """Every pair of process and phase once, in drawn order, dealt to the chains; or the pairs of `DIAGONAL` alone."""
    rng = random.Random(seed)
    pairs = rng.sample(sorted(TABLE), len(TABLE))
    kills = [Kill(*pair, rng.randint(1, LATEST_CALL[pair[1]]), rng.choice(["before", "after"])) for pair in pairs]
    kills = [kill for kill in kills if thorough or kill[:2] in DIAGONAL]
    return [kills[number::CHAINS] for number in range(CHAINS)]


class Chain:
    """One job and its kills."""

    def __init__(self, number: int, kills: list[Kill], folder: Path):
        self.kills, self.marks, self.log = kills, folder / "marks", folder / "log"
        self.marks.mkdir(parents=True)
        self.config = folder / "chaos.toml"
        self.config.write_text(CONFIG)
        self.run = RunDirectory(folder / f"chaos-{os.getpid()}-{number}")
        self.faults = ";".join([str(self.marks), *map(str, kills)])
        self.exit_codes: list[int] = []

    def drive(self) -> None:
        """Launches and resumes until the job has ended as usual."""
        try:
            for _ in range(1 + len(self.kills)):
                self.exit_codes.append(self.launch())
                self.wait_for_orphans()
                if self.exit_codes[-1] == 0:
                    return
        finally:
            for pid in self.members():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def launch(self) -> int:
        resume = ["--resume", str(self.run.path)] if self.run.config.exists() else []
        arguments = [str(LAUNCH), str(self.config), f"--run.directory={self.run.path}", *resume]
        fatal = [kill for number, kill in enumerate(self.kills) if kill.process in ENDS_JOB and not self.struck(number)]
        torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
        command = torchrun if fatal and fatal[0].process == "launcher" else [sys.executable]
        environment = {
            **os.environ,
            "LEEWAY_FAULTS": self.faults,
            "PYTHONPATH": os.pathsep.join([str(TESTS / "faults"), str(TESTS)]),
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command + arguments, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                return process.wait(LAUNCH_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise

    def struck(self, number: int) -> bool:
        return (self.marks / str(number)).exists()

    def members(self) -> dict[int, str]:
        return faults().members(self.faults)

    def wait_for_orphans(self) -> None:
        """Raises where a process outlives the launcher by more than `ORPHAN_S`."""
        limit = time.monotonic() + ORPHAN_S
        while left := self.members():
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(next(iter(left)))
                ended, _, _ = select.select([pidfd], [], [], max(0.0, limit - time.monotonic()))
                os.close(pidfd)
                assert ended, f"outlived the launcher by {ORPHAN_S} s: {left}"


@functools.cache
def faults():
    """The module tests/faults/sitecustomize.py, under a name of its own."""
    spec = importlib.util.spec_from_file_location("chaos_faults", TESTS / "faults" / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> Iterator[list[Chain]]:
    made = [Chain(i, kills, tmp_path_factory.mktemp(f"chain{i}")) for i, kills in enumerate(plan(SEED))]
    with ThreadPoolExecutor(CHAINS) as threads:
        for running in [threads.submit(chain.drive) for chain in made]:
            running.result()
    yield made


def test_every_pair_of_process_and_phase_is_in_the_table():
    assert set(TABLE) == set(itertools.product(PROCESSES, PHASES))
    assert {role for role in faults().ROLES} == set(PROCESSES)
    assert sorted(kill[:2] for chain in plan(SEED, thorough=True) for kill in chain) == sorted(TABLE)
    assert len(TABLE) >= 30
    brief = [kill for chain in plan(SEED, thorough=False) for kill in chain]
    assert {kill.process for kill in brief} == set(PROCESSES)
    assert sorted(kill.phase for kill in brief) == sorted(PHASES)


@pytest.mark.parametrize("place", sorted(set(TABLE.values())))
def test_every_place_in_the_table_exists(place):
    module, path = place.partition("@")[0].split(":")
    assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(CHAINS))
def test_a_job_killed_again_and_again_ends_as_usual(chains, number):
    chain = chains[number]
    log = chain.log.read_text(errors="replace")
    assert chain.exit_codes[-1] == 0, log[-4000:]
    missed = [kill for place, kill in enumerate(chain.kills) if not chain.struck(place)]
    assert not missed, f"never struck: {missed}"
    fatal = sum(kill.process in ENDS_JOB for kill in chain.kills)
    # A learner outlives its killed launcher by a moment, in which the next kill may strike: then one launch had both.
    assert fatal // 2 < len(chain.exit_codes) <= fatal + 1, f"{chain.exit_codes}: {log[-4000:]}"
    summary = json.loads(chain.run.summary.read_text())
    assert summary["steps"] == STEPS
    assert list(Path("/dev/shm").glob(f"leeway-{chain.run.name}*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(CHAINS))
def test_the_audit_agrees_with_the_ledger(chains, number):
    run = chains[number].run
    report = audit(run)
    assert report.findings == []
    assert report.version == STEPS
    assert report.counts["trained"] == STEPS * 4
    assert min(report.counts[end] for end in ("filtered", "failed")) > 0  # the job was no easy one
    ledger = Ledger(run.ledger)
    assert ledger.counts() == report.counts
    assert ledger.audit() == []
    ledger.close()
    assert json.loads(run.summary.read_text())["groups"]["trained"] == report.counts["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(CHAINS))
def test_the_record_gives_every_published_version_to_the_bit(chains, number):
    run = chains[number].run
    place = seat(load(run.config), {})
    torch.set_num_threads(place.threads)
    assert replay(run, place) == (STEPS + 1, "")

"""`kill -9` of an SGLang server, of its generator and of the writer of its weights, in every state of a version's way.

Coordinator, generators and servers are real; the learner has its versions made beforehand, so that every token that it
is given can be computed again.
"""

import os
import signal
import socket
import sqlite3
import time
from contextlib import closing, suppress
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from held import STATES, WAIT_S, Held
from sglang_server import ROOT, configure
from test_sglang import make_model, model_files, recomputed
from test_weights_kill import spawned

from engine.audit import audit
from engine.config import Config
from engine.generators.server import Server
from engine.placement import seat
from engine.policy import manifest_of, named_tensors
from engine.rollouts import Rollouts
from engine.run_directory import RunDirectory, create
from engine.schema import Group, Trained
from engine.weights import Publisher

pytestmark = pytest.mark.slow

SMALL = (
    "model.init.initializer_range=0.15",  # peaked enough that weights, positions and caches matter
    "generator.max_new_tokens=48",
    "deadlines.heartbeat_s=0.5",
    "deadlines.lease_s=3",
    "deadlines.take_s=60",
    "deadlines.evaluate_s=60",
    "run.steps=1000",
)


class Learner:
    """Takes, checks and publishes, as a learner does; version v is `make_model(v)`."""

    def __init__(self, config: Config):
        self.config, self.version, self.trained = config, -1, set[int]()
        self.run: RunDirectory = create(config, write_model)
        self.models = [make_model(0)]
        segment = f"{self.run.name}-{os.getpid()}"
        self.publisher = Publisher(segment, manifest_of(self.models[0], config))
        never, self._writer = os.pipe()
        stop = SimpleNamespace(asked=False, fd=never)
        self.rollouts = Rollouts(config, self.run, seat(config, {}), stop, segment, "")  # type: ignore[arg-type]

    def publish(self) -> None:
        self.version += 1
        self.models[self.version :] = [make_model(self.version)]
        weights = named_tensors(self.models[self.version])
        digest = self.publisher.publish(self.rollouts.incarnation, self.version, weights)
        self.rollouts.published(self.version, digest)

    def train(self) -> None:
        """One take, of which every token is that of its version; it becomes the next version."""
        taken = self.rollouts.take(self.config.run.groups_per_step, self.version)
        assert taken is not None
        for group in taken.groups:
            assert self.worst(group) < 1e-4, f"group {group.group_id} of {group.generator}"
            assert not group.kv_mixed and group.group_id not in self.trained
        group_ids = [group.group_id for group in taken.groups]
        self.rollouts.trained(Trained(self.version + 1, group_ids, "trained"))
        self.trained |= set(group_ids)
        self.publish()

    def worst(self, group: Group) -> float:
        """The largest |log-probability - that under exactly the version stamped on the token|."""
        ends = np.cumsum(group.lengths)[:-1]
        parts = (np.split(facts, ends) for facts in (group.token_ids, group.logprobs, group.versions))
        return max(
            np.abs(recomputed(self.models[int(version)], group.prompt_ids, ids, group.temperature) - logprobs)[
                versions == version
            ].max()
            for ids, logprobs, versions in zip(*parts, strict=True)
            for version in np.unique(versions)
        )

    def leased(self) -> dict[int, str]:
        """The groups that generators hold, and who does."""
        with closing(sqlite3.connect(f"file:{self.run.ledger}?mode=ro", uri=True)) as database:
            return dict(database.execute("SELECT group_id, generator FROM groups WHERE state = 'leased'"))

    def generator(self, name: str, state: str) -> Held:
        path = f'--generator.sglang.path=["{ROOT}/tests/halves", "{ROOT}/tests/stand_ins"]'
        arguments = ["--join", self.rollouts.address, "--key", str(self.run.key), "--name", name, path]
        return Held(state, arguments)

    def close(self) -> None:
        self.rollouts.close()
        self.publisher.close()


def test_server_or_generator_killed_in_every_state(tmp_path: Path, warm: list[str]) -> None:
    config = configure(*warm, *SMALL, f"run.directory={tmp_path}/kill-{os.getpid()}")
    held: set[int] = set()
    with closing(Learner(config)) as learner:
        learner.publish()
        for state, victim in product(STATES, ("server", "generator")):
            name = f"{victim}-in-{state}"
            with learner.generator(name, state) as generator:
                while (news := generator.news()) != state:
                    assert news == learner.version
                    learner.train()
                at_death = {group_id for group_id, who in learner.leased().items() if who == name}
                assert at_death, f"{name}: nothing was under way"
                kill(generator, victim)
            held |= at_death
        with learner.generator("last", ""):
            while not held <= learner.trained:
                learner.train()
            end = learner.rollouts.finish("done")
    assert end is not None and end.ends["trained"] == len(learner.trained)
    assert audit(learner.run).findings == []


def kill(generator: Held, victim: str) -> None:
    """Kills it with SIGKILL; the other one of the two ends too."""
    if victim == "server":
        os.kill(generator.server, signal.SIGKILL)
        refuses(generator.url)
        generator.release()
    else:
        generator.process.kill()
    generator.process.join(WAIT_S)
    assert generator.process.exitcode == (1 if victim == "server" else -signal.SIGKILL)
    refuses(generator.url)


def refuses(url: str) -> None:
    """Waits until nobody listens at `url`."""
    place, limit = urlsplit(url), time.monotonic() + WAIT_S
    with suppress(ConnectionRefusedError, ConnectionResetError):  # a reset: it is just closing
        while True:
            assert time.monotonic() < limit, f"{url} still answers"
            socket.create_connection((place.hostname, place.port), 1.0).close()  # type: ignore[arg-type]
            time.sleep(0.01)


def test_nothing_outlives_a_generator_killed_while_its_server_imports(warm: list[str]) -> None:
    """SGLang's own processes, real ones here, import for seconds before they see to their end by themselves."""
    mark = f"kill-{os.getpid()}"
    config = configure(
        *warm, f"generator.sglang.environment.LEEWAY_MARK={mark}", "generator.sglang.environment.LEEWAY_SPAWN=yes"
    )
    with spawned(start_server, config, model_files()) as (process, _):
        limit = time.monotonic() + WAIT_S
        while sum(b"spawn_main" in line for line in commands(mark)) < 2:  # the scheduler and the detokenizer
            assert process.is_alive() and time.monotonic() < limit
            time.sleep(0.01)
        process.kill()
        limit = time.monotonic() + 3.0
        while left := commands(mark):
            assert time.monotonic() < limit, left
            time.sleep(0.01)


def start_server(pipe: Connection, config: Config, files: dict[str, bytes]) -> None:
    """The process of a generator, as far as its server is concerned."""
    _kept = Server(config, files, threads=1)  # its files go with it
    signal.pause()


def write_model(folder: Path) -> None:
    for name, content in model_files().items():
        (folder / name).write_bytes(content)


def commands(mark: str) -> list[bytes]:
    """The command lines of the processes that began with LEEWAY_MARK=`mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"LEEWAY_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes())
    return found

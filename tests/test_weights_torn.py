"""Generators and publishers killed in every state of a version's way: every token ever sampled is that of exactly the
version stamped on it, by the learner's recomputation."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_embedded import CONTEXT, lease, letters, make_model, recomputed, split
from test_weights_kill import kept, spawned
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine.config import Generator
from engine.generators import embedded
from engine.generators.base import Sampled
from engine.generators.embedded import Embedded
from engine.policy import named_tensors
from engine.schema import Applied
from engine.weights import Intake, Manifest, Publisher, Subscriber, WeightsError, remove_stale, segment, subscribe
from engine.weights.segment import Segment
from engine.weights.subscribe import SharedSource

NAME = f"torn-{os.getpid()}"
VERSIONS = 5
FATAL = 2  # the version during which someone dies
MODELS = [make_model(seed=version) for version in range(VERSIONS)]
MANIFEST = Manifest.of(named_tensors(MODELS[0]), torch.float32)
TIMEOUT_S = 30.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    remove_stale()
    assert not segment.exists(NAME)


# ---- a generator, as the actor has one, and how it dies ----------------------------------------------------------


def generate(pipe: Connection, wants: Connection, state: str) -> None:
    """Samples lease after lease, takes the versions that `wants` names, and says both to `pipe`; dies in `state` of
    version `FATAL`."""
    torch.set_num_threads(1)
    config = Generator(slots=6, max_new_tokens=16, kv="recompute")
    engine = Embedded(make_model(seed=99), config, context=CONTEXT, stop_ids=[], text=letters)
    source = SharedSource(NAME)
    engine.manifest.require(source.manifest)
    subscriber = Subscriber(source, engine.memory)
    if state:
        GENERATOR_DIES[state](engine, subscriber)
    intake = Intake(subscriber, engine, 0, lambda: None)
    number = 0
    while True:
        while wants.poll():
            intake.want(wants.recv())
        applied = intake.advance()
        if applied is not None:
            if state == "applied" and applied.version == FATAL:
                die()
            pipe.send(applied)
        if engine.version < 0:
            continue
        while engine.num_free_slots > 0:
            engine.submit(lease(number))
            number += 1
        for sampled in engine.poll(0.0):
            pipe.send(sampled)


def dies_choosing(engine: Embedded, subscriber: Subscriber) -> None:
    choose = subscriber._choose

    def chosen(incarnation: int, version: int) -> Any:
        return die() if version == FATAL else choose(incarnation, version)

    subscriber._choose = chosen  # type: ignore[method-assign]


def dies_staging(engine: Embedded, subscriber: Subscriber) -> None:
    read = subscriber._source.read

    def reads(header: Any, part: Any, into: torch.Tensor) -> Iterator[Any]:
        half = len(into) // 2 // 8 * 8
        if header.version == FATAL:
            into[:half] = subscriber._source._parts[part, header.slot][:half]  # type: ignore[attr-defined]
            die()
        yield from read(header, part, into)

    subscriber._source.read = reads  # type: ignore[method-assign]


def dies_verifying(engine: Embedded, subscriber: Subscriber) -> None:
    read = subscriber._source.read

    def reads(header: Any, part: Any, into: torch.Tensor) -> Iterator[Any]:
        yield from read(header, part, into)
        die() if header.version == FATAL else None

    subscriber._source.read = reads  # type: ignore[method-assign]


def dies_applying(engine: Embedded, subscriber: Subscriber) -> None:
    load, replace = engine.load, embedded.replace
    left = [3]

    def replaces(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        left[0] -= 1
        replace(parameter, tensor) if left[0] else die()

    def loads(version: int, weights: Any) -> None:
        if version == FATAL:
            embedded.replace = replaces  # type: ignore[assignment]
        load(version, weights)

    engine.load = loads  # type: ignore[method-assign]


GENERATOR_DIES: dict[str, Callable[[Embedded, Subscriber], None]] = {
    "prepare": dies_choosing,
    "stage": dies_staging,
    "verify": dies_verifying,
    "apply": dies_applying,
    "applied": lambda engine, subscriber: None,
}


class Witness:
    """What a generator said, and the check of all it sampled."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self.applied = -1
        self.sampled: list[Sampled] = []

    def hear(self) -> bool:
        """The next thing that it said, if there is one; also when it has died."""
        with suppress(EOFError, ConnectionResetError):
            if self._pipe.poll(0.001):
                message = self._pipe.recv()
                if isinstance(message, Applied):
                    self.applied = message.version
                else:
                    self.sampled.append(message)
                return True
        return False

    def until(self, done: Callable[["Witness"], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not done(self):
            assert time.monotonic() < deadline, f"still at version {self.applied} after {TIMEOUT_S} s"
            self.hear()

    def samples_with(self, version: int) -> bool:
        return self.applied == version and any(version in sampled.versions for sampled in self.sampled[-8:])

    def versions(self) -> set[int]:
        """The versions of all its tokens, after checking each."""
        found: set[int] = set()
        for sampled in self.sampled:
            assert not sampled.kv_mixed
            pairs = zip(split(sampled, sampled.logprobs), split(sampled, sampled.versions), strict=True)
            for sample, (logprobs, versions) in enumerate(pairs):
                for version in set(versions.tolist()):
                    own = versions == version
                    expected = recomputed(MODELS[version], sampled, sample)[own]
                    np.testing.assert_allclose(logprobs[own], expected, atol=1e-4)
                found |= set(versions.tolist())
        return found


@pytest.mark.parametrize("state", GENERATOR_DIES)
def test_a_generator_dies(state: str) -> None:
    """The other one goes on and sees every version; one that joins later starts from the newest."""
    wants = [_pipe() for _ in range(3)]
    with (
        closing(Publisher(NAME, MANIFEST)) as publisher,
        spawned(generate, wants[0][0], state) as (dying, its_pipe),
        spawned(generate, wants[1][0], "") as (_, other_pipe),
    ):
        doomed, healthy = Witness(its_pipe), Witness(other_pipe)
        for version in range(FATAL + 1):
            publish(publisher, version, wants[:2])
            for witness in (healthy, doomed) if version < FATAL else (healthy,):
                witness.until(lambda w, v=version: w.samples_with(v))
        dying.join(TIMEOUT_S)
        assert dying.exitcode == -signal.SIGKILL
        while doomed.hear():
            pass
        with spawned(generate, wants[2][0], "") as (_, late_pipe):
            late = Witness(late_pipe)
            for version in range(FATAL + 1, VERSIONS):
                publish(publisher, version, wants[1:])
                for witness in (healthy, late):
                    witness.until(lambda w, v=version: w.samples_with(v))
        assert doomed.versions() <= set(range(FATAL)) and doomed.applied == FATAL - 1
        assert healthy.versions() == set(range(VERSIONS))
        assert min(late.versions()) > FATAL


def publish(publisher: Publisher, version: int, wants: list[tuple[Connection, Connection]]) -> None:
    publisher.publish(0, version, named_tensors(MODELS[version]))
    for _, send in wants:
        with suppress(BrokenPipeError):
            send.send(version)


def _pipe() -> tuple[Connection, Connection]:
    from multiprocessing import Pipe

    return Pipe(duplex=False)


# ---- a publisher, and how it dies --------------------------------------------------------------------------------


def publish_until_death(pipe: Connection, state: str) -> None:
    torch.set_num_threads(1)
    publisher = Publisher(NAME, MANIFEST)
    for version in range(FATAL):
        publisher.publish(0, version, named_tensors(MODELS[version]))
    pipe.send(FATAL - 1)
    pipe.recv()
    tensors = named_tensors(MODELS[FATAL])
    if state == "prepare":
        tensors = (die() for _ in range(1))  # type: ignore[assignment]
    elif state == "write":
        tensors = dies_after(4, tensors)
    elif state == "commit":
        Segment.commit = commits_half  # type: ignore[method-assign]
    publisher.publish(0, FATAL, tensors)
    die()


def dies_after(number: int, tensors: Iterator[Any]) -> Iterator[Any]:
    for _ in range(number):
        yield next(tensors)
    die()


def commits_half(self: Segment, slot: int, incarnation: int, version: int, digest: int, **delta: int) -> None:
    words = self._words(slot)
    words[1:4] = (incarnation, version, digest)
    die()


@pytest.mark.parametrize("state", ["prepare", "write", "commit", "committed"])
def test_a_publisher_dies(state: str) -> None:
    """Who samples goes on, and who joins starts, with the newest version that is whole."""
    receive, send = _pipe()
    newest = FATAL if state == "committed" else FATAL - 1
    with ExitStack() as stack:
        dying, pipe = stack.enter_context(spawned(publish_until_death, state))
        assert pipe.poll(TIMEOUT_S) and pipe.recv() == FATAL - 1
        stack.enter_context(kept(NAME, lambda: pipe.send(None)))
        dying.join(TIMEOUT_S)
        assert dying.exitcode == -signal.SIGKILL
        with closing(subscribe("shm", segment=NAME, host="", address="", timeout_s=1.0)) as reader:
            if newest < FATAL:
                with pytest.raises(WeightsError, match=rf"the newest is \(0, {newest}\)"):
                    reader.stage(0, FATAL)
            assert reader.stage(0, newest).version == newest
        with spawned(generate, receive, "") as (_, its_pipe):
            witness = Witness(its_pipe)
            for version in (newest, FATAL):  # the second is not there, unless it was committed
                send.send(version)
                before = len(witness.sampled)
                witness.until(lambda w, b=before: w.applied == newest and len(w.sampled) > b + 5)
            assert witness.versions() == {newest}


def publish_as_rank(pipe: Connection, rank: int, folder: str) -> None:
    """One of two ranks that hold half of each tensor; the second dies while it writes version `FATAL`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    publisher = Publisher(NAME, MANIFEST)
    for version in range(FATAL + 1):
        halves = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in named_tensors(MODELS[version])}
        tensors = iter(halves.items())
        if rank == 1 and version == FATAL:
            tensors = dies_after(4, tensors)
        try:
            publisher.publish(0, version, tensors)
        except RuntimeError as error:  # the first rank's, which hears that the second has gone
            pipe.send(str(error))
            return
        pipe.send(version)


def test_a_rank_of_the_publisher_dies(tmp_path: Path) -> None:
    """The others hear of it, and the version before is whole."""
    with (
        spawned(publish_as_rank, 0, str(tmp_path)) as (_, lead_pipe),
        spawned(publish_as_rank, 1, str(tmp_path)) as (dying, _),
    ):
        for expected in range(FATAL):
            assert lead_pipe.poll(TIMEOUT_S) and lead_pipe.recv() == expected
        with closing(subscribe("shm", segment=NAME, host="", address="", timeout_s=1.0)) as reader:
            dying.join(TIMEOUT_S)
            assert dying.exitcode == -signal.SIGKILL
            assert lead_pipe.poll(TIMEOUT_S) and "gloo" in lead_pipe.recv()
            staged = reader.stage(0, FATAL - 1)
            assert staged.version == FATAL - 1
            for name, tensor in named_tensors(MODELS[FATAL - 1]):
                assert torch.equal(staged.tensors[name], tensor), name
            with pytest.raises(WeightsError, match=rf"the newest is \(0, {FATAL - 1}\)"):
                reader.stage(0, FATAL)

"""Processes killed with SIGKILL while they write, serve or read: no torn version is ever staged."""

import fcntl
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Timer
from typing import Any

import pytest
import torch

from engine.weights import (
    Manifest,
    Publisher,
    Server,
    Staged,
    Subscriber,
    WeightsError,
    remove_stale,
    segment,
    subscribe,
)
from engine.weights.subscribe import SharedSource

SHAPES = [(512, 512), (3,), (1024, 512), (256, 256), (1024, 256)]  # 4.5 MiB
MANIFEST = Manifest.lay_out([(f"layer{i}", shape, torch.float32) for i, shape in enumerate(SHAPES)])
NAME = f"kill-{os.getpid()}"

_fork = multiprocessing.get_context("fork")  # a child starts in milliseconds, with torch loaded


@contextmanager
def spawned(target: Callable[..., None], *args: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """A child that runs `target(pipe, *args)`, and our end of the pipe; killed at the end."""
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(10)


@contextmanager
def kept(name: str, end: Callable[[], object]) -> Iterator[None]:
    """After `end`, which ends the segment's writer: keeps the segment from other publishers of this host, those of
    other tests, which would remove it."""
    with open(segment._path(name)) as file:
        end()
        fcntl.flock(file, fcntl.LOCK_SH)  # when the writer is dead
        yield


def last(pipe: Connection) -> int:
    """The last number that a dead child sent."""
    number = -1
    try:
        while pipe.poll(0):
            number = pipe.recv()
    except (EOFError, ConnectionResetError):
        pass
    return number


def version_of(staged: Staged) -> int:
    """The version that every element of `staged` says it is."""
    assert list(staged.tensors) == [entry.name for entry in MANIFEST.entries]
    for name, tensor in staged.tensors.items():
        low, high = tensor.aminmax()
        assert low == high == staged.version, f"{name} of version {staged.version} holds {low}..{high}"
    return staged.version


def constant(version: int) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in MANIFEST.entries:
        yield entry.name, torch.full(entry.shape, float(version))


def dies_at(version: int, number: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `version`; the process kills itself instead of giving number `number`."""
    for count, item in enumerate(constant(version)):
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
    os.kill(os.getpid(), signal.SIGKILL)


def publish_and_die(pipe: Connection, number: int) -> None:
    torch.set_num_threads(1)
    publisher = Publisher(NAME, MANIFEST)
    for version in (1, 2):
        publisher.publish(0, version, constant(version))
    pipe.send(2)
    pipe.recv()
    publisher.publish(0, 3, dies_at(3, number))


def publish_for_ever(pipe: Connection) -> None:
    torch.set_num_threads(1)
    publisher = Publisher(NAME, MANIFEST)
    version = 0
    while True:
        publisher.publish(0, version, constant(version))
        pipe.send(version)
        version += 1


def serve_for_ever(pipe: Connection) -> None:
    server = Server(NAME, "127.0.0.1")
    pipe.send(server.port)
    signal.pause()


def read_for_ever(pipe: Connection, route: str, port: int) -> None:
    torch.set_num_threads(1)
    subscriber = connect(route, port)
    while True:
        with suppress(WeightsError):  # overtaken in every attempt
            pipe.send(version_of(subscriber.stage(0, 0)))


def connect(route: str, port: int, timeout_s: float = 5.0) -> Subscriber:
    return subscribe(route, segment=NAME, host="", address=f"tcp://127.0.0.1:{port}", timeout_s=timeout_s)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    remove_stale()
    assert not segment.exists(NAME)


@pytest.mark.parametrize("number", range(len(SHAPES) + 1))
def test_writer_dies_before_each_tensor(number: int) -> None:
    with spawned(publish_and_die, number) as (process, pipe):
        assert pipe.recv() == 2
        with kept(NAME, lambda: pipe.send(None)), closing(Subscriber(SharedSource(NAME))) as subscriber:
            process.join(10)
            assert process.exitcode == -signal.SIGKILL
            for asked in (1, 2):
                assert version_of(subscriber.stage(0, asked)) == 2
            with pytest.raises(WeightsError, match=r"version \(0, 3\) is not there"):
                subscriber.stage(0, 3)
            assert segment.exists(NAME)  # until `clean` has it removed


@pytest.mark.parametrize("seed", range(20))
def test_writer_killed_at_any_moment(seed: int) -> None:
    with spawned(publish_for_ever) as (process, pipe):
        assert pipe.poll(10) and pipe.recv() == 0
        kill_at = time.monotonic() + random.Random(seed).uniform(0, 0.04)
        with closing(Subscriber(SharedSource(NAME))) as subscriber:
            while time.monotonic() < kill_at:
                with suppress(WeightsError):  # the writer, which never rests, may overtake every attempt
                    version_of(subscriber.stage(0, 0))
            process.kill()
            process.join(10)
            published = last(pipe)
            assert version_of(subscriber.stage(0, max(published, 0))) in (published, published + 1)


@pytest.mark.parametrize("route", ["shm", "tcp"])
def test_readers_killed_at_any_moment(route: str) -> None:
    version = 0
    with closing(Publisher(NAME, MANIFEST)) as publisher, closing(Server(NAME, "127.0.0.1")) as server:
        publisher.publish(0, 0, constant(0))
        with closing(connect(route, server.port)) as survivor:
            for seed in range(10):
                with spawned(read_for_ever, route, server.port) as (process, pipe):
                    assert pipe.poll(10) and pipe.recv() <= version
                    kill_at = time.monotonic() + random.Random(seed).uniform(0, 0.03)
                    while time.monotonic() < kill_at:
                        version += 1
                        publisher.publish(0, version, constant(version))
                assert process.exitcode == -signal.SIGKILL  # it saw nothing torn before
                assert version_of(survivor.stage(0, version)) == version


@pytest.mark.parametrize("seed", range(6))
def test_server_killed_at_any_moment(seed: int) -> None:
    version = 0
    with closing(Publisher(NAME, MANIFEST)) as publisher, spawned(serve_for_ever) as (process, pipe):
        publisher.publish(0, 0, constant(0))
        assert pipe.poll(10)
        killer = Timer(random.Random(seed).uniform(0.01, 0.06), process.kill)
        with closing(connect("tcp", pipe.recv(), timeout_s=0.3)) as subscriber:
            killer.start()
            with pytest.raises(WeightsError, match="no answer in 0.3 s"):
                while True:
                    version_of(subscriber.stage(0, version))
                    version += 1
                    publisher.publish(0, version, constant(version))
            killer.join()
        with closing(Subscriber(SharedSource(NAME))) as direct:
            assert version_of(direct.stage(0, version)) == version


FEW = Manifest.lay_out([(f"layer{i}", shape, torch.bfloat16) for i, shape in enumerate(SHAPES)])


def publish_few_for_ever(pipe: Connection) -> None:
    """Versions that differ in the first element of each tensor alone, so that deltas travel."""
    torch.set_num_threads(1)
    publisher = Publisher(NAME, FEW, delta=True)
    tensors = {entry.name: torch.zeros(entry.shape) for entry in FEW.entries}
    version = 0
    while True:
        for tensor in tensors.values():
            tensor.view(-1)[0] = version % 200
        publisher.publish(0, version, tensors.items())
        pipe.send(version)
        version += 1


@pytest.mark.parametrize("seed", range(10))
def test_writer_of_deltas_killed_at_any_moment(seed: int) -> None:
    with spawned(publish_few_for_ever) as (process, pipe), closing(staging_few(pipe)) as subscriber:
        kill_at = time.monotonic() + random.Random(seed).uniform(0, 0.1)
        while time.monotonic() < kill_at:
            with suppress(WeightsError):
                few_of(subscriber.stage(0, 0))
        process.kill()
        process.join(10)
        published = last(pipe)
        assert few_of(subscriber.stage(0, max(published, 0))).version in (published, published + 1)


def staging_few(pipe: Connection) -> Subscriber:
    assert pipe.poll(10) and pipe.recv() == 0
    source = SharedSource(NAME)
    source.far = True  # takes deltas, as readers through TCP do
    return Subscriber(source)


def few_of(staged: Staged) -> Staged:
    for name, tensor in staged.tensors.items():
        flat = tensor.view(-1)
        assert flat[0] == staged.version % 200 and not flat[1:].any(), f"{name} of version {staged.version} is torn"
    return staged

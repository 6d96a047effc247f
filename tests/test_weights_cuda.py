"""Versions from GPU to GPU, between processes; run by bench/gpu.sh where there is one."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
from test_gpu import TABLE, policy

from engine.blocks import Cuda
from engine.config import parse
from engine.generators.embedded import Embedded
from engine.policy import named_tensors
from engine.weights import (
    Manifest,
    Publisher,
    Slots,
    Staged,
    Subscriber,
    WeightsError,
    host_id,
    remove_stale,
    subscribe,
)

pytestmark = pytest.mark.gpu

NAME = f"cuda-{os.getpid()}"
GPU = torch.device("cuda", 0)
SHAPES = [(1000, 1000), (7,), (3,), (4096, 2048), (129, 16), (5, 4097)]
MANIFEST = Manifest.lay_out([(f"w{number}", shape, torch.bfloat16) for number, shape in enumerate(SHAPES)])
WAIT_S = 120.0  # a process that begins imports torch and makes a context
_spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


def weights_of(version: int) -> list[tuple[str, torch.Tensor]]:
    """float32, the same in every process."""
    chance = torch.Generator().manual_seed(version)
    return [(f"w{number}", torch.randn(shape, generator=chance)) for number, shape in enumerate(SHAPES)]


def on_gpu(named: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to(GPU)) for name, tensor in named]


def is_exact(staged: Staged) -> bool:
    """Whether every bit on the GPU is that of the version that it says it is."""
    return all(
        staged.tensors[name].device == GPU and torch.equal(staged.tensors[name].cpu(), tensor.bfloat16())
        for name, tensor in weights_of(staged.version)
    )


@contextmanager
def spawned(target: Callable[..., None]) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that runs `target(pipe, NAME)` and has said that it is there; killed at the end."""
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=target, args=(theirs, NAME), daemon=True)
    process.start()
    theirs.close()
    try:
        assert heard(ours) == "here"
        yield process, ours
    finally:
        process.kill()
        process.join(WAIT_S)


def heard(pipe: Connection) -> Any:
    assert pipe.poll(WAIT_S), "it says nothing"
    return pipe.recv()


def connect(name: str, **options: Any) -> Subscriber:
    place = {"segment": name, "host": host_id(), "address": "", "timeout_s": WAIT_S, "device": "cuda"}
    return subscribe("cuda_ipc", **place, **options)


def stage_as_told(pipe: Connection, name: str) -> None:
    with closing(connect(name)) as subscriber:
        pipe.send("here")
        while True:
            version = pipe.recv()
            try:
                staged = subscriber.stage(0, version)
                pipe.send((staged.version, staged.digest, is_exact(staged)))
            except WeightsError as error:
                pipe.send(str(error))


def stage_for_ever(pipe: Connection, name: str) -> None:
    with closing(connect(name)) as subscriber:
        pipe.send("here")
        while True:
            with suppress(WeightsError):  # overtaken in every attempt
                staged = subscriber.stage(0, 0)
                pipe.send((staged.version, is_exact(staged)))


def publish_four(pipe: Connection, name: str) -> None:
    named = [on_gpu(weights_of(version)) for version in range(4)]
    publisher = Publisher(name, MANIFEST, slots=Slots(Cuda(GPU), named[0]))
    publisher.publish(0, 0, named[0])
    pipe.send("here")
    for version in range(1, 4):
        publisher.publish(0, version, named[version])
    pipe.send("published")
    pipe.recv()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    remove_stale()


def test_versions_stream_bit_for_bit_while_a_reader_is_killed() -> None:
    with closing(Publisher(NAME, MANIFEST, slots=Slots(Cuda(GPU), weights_of(0)))) as publisher:
        publisher.publish(0, 0, on_gpu(weights_of(0)))
        with spawned(stage_as_told) as (_, steady):
            free, _ = torch.cuda.mem_get_info(GPU)
            with spawned(stage_for_ever) as (doomed, restless):
                for version in range(1, 31):
                    digest = publisher.publish(0, version, on_gpu(weights_of(version)))
                    steady.send(version)
                    assert heard(steady) == (version, digest, True)
                doomed.kill()
                doomed.join(WAIT_S)
                seen = []
                with suppress(EOFError):
                    while restless.poll(0):
                        seen.append(restless.recv())
                assert len({version for version, _ in seen}) > 1 and all(exact for _, exact in seen)
            deadline = time.monotonic() + WAIT_S
            while torch.cuda.mem_get_info(GPU)[0] < free - (32 << 20):  # what it held comes back
                assert time.monotonic() < deadline
                time.sleep(0.1)
            for version in (31, 32):
                digest = publisher.publish(0, version, on_gpu(weights_of(version)))
                steady.send(version)
                assert heard(steady) == (version, digest, True)


def test_a_writer_killed_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # where slots do not lie
    with spawned(publish_four) as (writer, news), spawned(stage_as_told) as (reader, pipe):
        assert heard(news) == "published"
        pipe.send(3)
        version, _, exact = heard(pipe)
        assert version == 3 and exact
        writer.kill()
        writer.join(WAIT_S)
        with pytest.raises(WeightsError, match="weights.route = 'cuda_ipc': cudaIpcOpenMemHandle: CUDA error"):
            connect(NAME)
        pipe.send(3)
        with suppress(EOFError, ConnectionResetError):  # CUDA has ended it
            answer = heard(pipe)
            assert "no whole copy" in answer if isinstance(answer, str) else answer[0] == 3 and answer[2]


def sample_staged(pipe: Connection, name: str) -> None:
    model: Any = policy()
    model.to(GPU).requires_grad_(False)
    engine = Embedded(model, parse(TABLE).generator, context=64, stop_ids=[1], text=lambda ids: "")
    with closing(connect(name, memory=engine.memory)) as subscriber:
        engine.manifest.require(subscriber.manifest)
        pipe.send("here")
        for version in (1, 2, 3):
            pipe.recv()
            staged = subscriber.stage(0, version)
            engine.load(version, staged.tensors)
            own = model.state_dict()
            taken = all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in staged.tensors.items())
            pipe.send((taken, {name: tensor.cpu().numpy() for name, tensor in own.items()}))


def test_the_embedded_generator_samples_from_what_it_staged() -> None:
    model: Any = policy()
    model.to(GPU)
    named = list(named_tensors(model))
    manifest = Manifest.of(named, torch.float32)
    with closing(Publisher(NAME, manifest, slots=Slots(Cuda(GPU), named))) as publisher, torch.no_grad():
        with spawned(sample_staged) as (_, pipe):
            for version in (1, 2, 3):
                for _, tensor in named:
                    tensor.mul_(1.5)
                publisher.publish(0, version, named)
                pipe.send(version)
                taken, own = heard(pipe)
                assert taken and all((own[name] == tensor.cpu().numpy()).all() for name, tensor in named)

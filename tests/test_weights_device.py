"""Versions that lie outside of the segment, in blocks: here blocks of the host. What holds of other routes holds."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_weights import (  # noqa: F401  (pytest runs them here too, with the fixtures of this file)
    MANIFEST,
    is_ended_by_an_overwrite,
    name,
    tensors,
    test_a_copy_overwritten_meanwhile_is_made_again,
    test_a_reader_that_is_always_overtaken_gives_up,
    test_a_staged_copy_is_private_until_the_next,
    test_a_version_half_written_is_not_seen,
    test_damage_is_noticed,
    test_publishing_other_tensors_names_the_first,
    test_the_asked_version_else_the_newest,
    test_two_memories_are_staged_in_by_turns,
    test_versions_only_grow,
    test_what_is_not_there_is_an_error,
    values,
)
from test_weights_kill import MANIFEST as MANY
from test_weights_kill import NAME, constant, kept, last, spawned, version_of

from engine.blocks import Block, Host
from engine.generators import guest
from engine.ops import buckets
from engine.weights import (
    Manifest,
    Publisher,
    Slots,
    Subscriber,
    WeightsError,
    device,
    host_id,
    remove_stale,
    segment,
    subscribe,
)
from engine.weights.device import DeviceSource
from engine.weights.segment import Segment, as_hex

WAIT_S = 20.0
SHAPES = {entry.name: entry.shape for entry in MANIFEST.entries}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CHUNK_BYTES", 1 << 20)


@pytest.fixture
def publisher(name: str) -> Iterator[Publisher]:  # noqa: F811
    with closing(Publisher(name, MANIFEST, slots=Slots(Host(), tensors(0)))) as publisher:
        yield publisher


@pytest.fixture
def subscriber(publisher: Publisher) -> Iterator[Subscriber]:
    with closing(Subscriber(DeviceSource(publisher.name, Host()))) as subscriber:
        yield subscriber


def test_a_version_arrives_bit_for_bit_and_not_through_the_segment(name: str) -> None:  # noqa: F811
    torch.manual_seed(0)
    given = [
        ("scalar", torch.tensor(3.14159)),
        ("trained", torch.randn(1033, 1000, requires_grad=True)),
        ("transposed", torch.randn(20, 30).T),
        ("empty", torch.empty(0, 4)),
        ("integer", torch.arange(5)),
    ]
    manifest = Manifest.of(given, torch.bfloat16, wide={"transposed"})
    with closing(Publisher(name, manifest, slots=Slots(Host(), given))) as publisher:
        digest = publisher.publish(0, 1, given)
        with closing(Subscriber(DeviceSource(name, Host()))) as subscriber:
            staged = subscriber.stage(0, 1)
        assert (segment.DIRECTORY / f"{segment.PREFIX}{name}").stat().st_size < 20_000 < manifest.num_bytes
        with closing(Segment.open(name)) as seen:
            assert len(seen.payload(0)) == 0
    expected = [tensor.detach().to(manifest.entries[number].torch_dtype) for number, (_, tensor) in enumerate(given)]
    for (key, _), tensor in zip(given, expected, strict=True):
        assert staged.tensors[key].dtype == tensor.dtype and torch.equal(staged.tensors[key], tensor), key
    payload = torch.zeros(manifest.num_bytes, dtype=torch.uint8)
    for view, tensor in zip(manifest.views(payload).values(), expected, strict=True):
        view.copy_(tensor)
    assert staged.digest == digest == as_hex(buckets.digest(int(buckets.checksum(payload)), len(payload)))


def test_a_publisher_that_closes_takes_its_versions_back(name: str) -> None:  # noqa: F811
    publisher = Publisher(name, MANIFEST, slots=Slots(Host(), tensors(0)))
    publisher.publish(0, 1, tensors(1))
    with closing(Subscriber(DeviceSource(name, Host()))) as subscriber:
        staged = subscriber.stage(0, 1)
        publisher.close()
        with pytest.raises(WeightsError, match="no whole copy"):
            subscriber.stage(0, 1)
        assert values(staged.tensors) == {1.0}


def test_an_overwrite_ends_the_read_at_its_next_chunk(publisher: Publisher) -> None:
    is_ended_by_an_overwrite(publisher, DeviceSource(publisher.name, Host()))


def test_a_server_copies_from_the_block_of_its_generator_and_lets_an_earlier_ones_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`guest.load` as SGLang calls it, with a model that keeps what it is given."""
    monkeypatch.setattr(guest, "_opened", {})
    loaded: dict[str, torch.Tensor] = {}
    model = SimpleNamespace(load_weights=lambda views: loaded.update((key, view.clone()) for key, view in views))
    for value in (1.0, 2.0):
        block = Host().allocate(MANIFEST.num_bytes)
        for view in MANIFEST.views(block.tensor).values():
            view.fill_(value)
        order = {"device": "cpu", "handle": block.handle.hex(), "num_bytes": MANIFEST.num_bytes}
        listed = [(entry.name, entry.dtype, entry.shape, entry.offset) for entry in MANIFEST.entries]
        for _ in range(2):
            guest.load(model, [(json.dumps({**order, "tensors": listed}), None)])
        assert values(loaded) == {value} and {key: view.shape for key, view in loaded.items()} == SHAPES
        assert list(guest._opened) == [block.handle.hex()]
        block.close()


def test_too_little_memory_says_how_much_is_needed(name: str) -> None:  # noqa: F811
    class Full(Host):
        def allocate(self, num_bytes: int) -> Block:
            raise RuntimeError("cudaMalloc: CUDA error 2")

    with pytest.raises(WeightsError, match="cuda_ipc': two versions need 5 MiB of the GPU; cudaMalloc: CUDA error 2"):
        Publisher(name, MANIFEST, slots=Slots(Full(), tensors(0)))
    assert not segment.exists(name)


def test_a_segment_that_holds_its_versions_has_no_table(name: str) -> None:  # noqa: F811
    with closing(Publisher(name, MANIFEST)), pytest.raises(WeightsError, match="cuda_ipc'"):
        DeviceSource(name, Host())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"host": "elsewhere/1"}, "is for generators of elsewhere/1 alone, this is "),
        ({"host": host_id(), "device": "cpu"}, "'cpu' is no CUDA device of this host"),
        ({"host": host_id(), "device": "auto"}, "'cuda' is no CUDA device of this host"),
    ],
)
def test_a_generator_that_cannot_is_told(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, place: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WeightsError, match=f"weights.route = 'cuda_ipc': {message}"):
        subscribe("cuda_ipc", segment=publisher.name, address="", timeout_s=1.0, **place)


# ---- processes that die ------------------------------------------------------------------------------------------


def publish_for_ever(pipe: Connection) -> None:
    torch.set_num_threads(1)
    publisher = Publisher(NAME, MANY, slots=Slots(Host(), constant(0)))
    version = 0
    while True:
        publisher.publish(0, version, constant(version))
        pipe.send(version)
        version += 1


def read_for_ever(pipe: Connection) -> None:
    torch.set_num_threads(1)
    subscriber = Subscriber(DeviceSource(NAME, Host()))
    while True:
        with suppress(WeightsError):  # overtaken in every attempt
            pipe.send(version_of(subscriber.stage(0, 0)))


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.02, 0.03])
def test_a_writer_killed_leaves_a_whole_version_to_its_readers_and_an_error_to_others(delay_s: float) -> None:
    with spawned(publish_for_ever) as (process, pipe):
        assert pipe.poll(WAIT_S) and pipe.recv() == 0
        with closing(Subscriber(DeviceSource(NAME, Host()))) as subscriber:
            kill_at = time.monotonic() + delay_s
            while time.monotonic() < kill_at:
                with suppress(WeightsError):  # the writer, which never rests, may overtake every attempt
                    version_of(subscriber.stage(0, 0))
            with kept(NAME, process.kill):
                process.join(WAIT_S)
                published = max(last(pipe), 0)
                assert version_of(subscriber.stage(0, published)) in (published, published + 1)
                with pytest.raises(WeightsError, match=f"cuda_ipc': /proc/{process.pid}/fd/.* is gone"):
                    DeviceSource(NAME, Host())
    remove_stale()
    assert not segment.exists(NAME)


def test_a_reader_killed_leaves_nothing_behind() -> None:
    version = 0
    with closing(Publisher(NAME, MANY, slots=Slots(Host(), constant(0)))) as publisher:
        publisher.publish(0, 0, constant(0))
        with closing(Subscriber(DeviceSource(NAME, Host()))) as survivor:
            for delay_s in (0.0, 0.01, 0.02):
                with spawned(read_for_ever) as (process, pipe):
                    assert pipe.poll(WAIT_S) and pipe.recv() <= version
                    kill_at = time.monotonic() + delay_s
                    while version < 3 or time.monotonic() < kill_at:
                        version += 1
                        publisher.publish(0, version, constant(version))
                assert process.exitcode == -signal.SIGKILL  # it saw nothing torn before
                assert version_of(survivor.stage(0, version)) == version
    assert not segment.exists(NAME)

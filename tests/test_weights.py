"""Manifest, segment, publisher, subscriber and server within one process."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq

from engine.config import ConfigError
from engine.ops import buckets
from engine.weights import Manifest, Publisher, Server, Subscriber, WeightsError, host_id, segment, subscribe
from engine.weights.segment import Header, Overwritten, Part, Segment, as_hex
from engine.weights.subscribe import ATTEMPTS, SharedSource, Source
from engine.weights.tcp import Describe, Read, TcpSource

Tensors = list[tuple[str, torch.Tensor]]


def tensors(value: float) -> Tensors:
    return [("a", torch.full((300, 1000), value)), ("b", torch.full((7,), value)), ("c", torch.full((900, 500), value))]


MANIFEST = Manifest.of(tensors(0.0), torch.float32)


def values(found: dict[str, torch.Tensor]) -> set[float]:
    return {value for tensor in found.values() for value in tensor.unique().tolist()}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("engine.weights.subscribe"), "SHARED_PIECE_BYTES", 1 << 20)


@pytest.fixture
def name() -> str:
    return f"test-{os.getpid()}"


@pytest.fixture
def publisher(name: str) -> Iterator[Publisher]:
    with closing(Publisher(name, MANIFEST)) as publisher:
        yield publisher


def test_manifest_offsets_are_aligned() -> None:
    manifest = Manifest.lay_out(
        [
            ("a", (3, 5), torch.float32),  # 60 bytes
            ("b", (128,), torch.bfloat16),  # 256 bytes
            ("c", (0, 4), torch.float32),
            ("d", (), torch.int64),  # 8 bytes
        ]
    )
    assert [entry.offset for entry in manifest.entries] == [0, 256, 512, 512]
    assert manifest.num_bytes == 768
    again = Manifest.decode(manifest.encode())
    assert again == manifest and again.digest == manifest.digest and len(manifest.digest) == 64


def test_manifest_refuses_a_name_twice() -> None:
    with pytest.raises(ValueError, match="w stands twice"):
        Manifest.lay_out([("w", (1,), torch.float32), ("w", (2,), torch.float32)])


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            [("x", (2,), torch.float32), ("y", (4,), torch.float32)],
            r"tensor 1 is y float32\[4\], expected y float32\[3\]",
        ),
        ([("x", (2,), torch.float32), ("z", (3,), torch.float32)], r"tensor 1 is z .* expected y"),
        ([("x", (2,), torch.bfloat16), ("y", (3,), torch.float32)], r"tensor 0 is x bfloat16"),
        ([("x", (2,), torch.float32)], r"tensor 1 is none"),
        ([("x", (2,), torch.float32), ("y", (3,), torch.float32), ("w", (1,), torch.float32)], r"tensor 2 is w"),
    ],
)
def test_manifest_names_the_first_difference(theirs: list, message: str) -> None:
    mine = Manifest.lay_out([("x", (2,), torch.float32), ("y", (3,), torch.float32)])
    mine.require(Manifest.decode(mine.encode()))
    with pytest.raises(WeightsError, match=message):
        mine.require(Manifest.lay_out(theirs))


def test_tensors_arrive_cast(name: str) -> None:
    given = [
        ("scalar", torch.tensor(3.14159)),
        ("trained", torch.randn(33, 65, requires_grad=True)),
        ("transposed", torch.randn(20, 30).T),
        ("empty", torch.empty(0, 4)),
        ("integer", torch.arange(5)),
    ]
    manifest = Manifest.of(given, torch.bfloat16)
    with closing(Publisher(name, manifest)) as publisher, closing(Subscriber(SharedSource(name))) as subscriber:
        digest = publisher.publish(0, 1, given)
        staged = subscriber.stage(0, 1)
    manifest.require(subscriber.manifest)
    assert staged.digest == digest
    assert staged.tensors["integer"].dtype == torch.int64
    for key, tensor in given:
        expected = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(staged.tensors[key], expected) and not staged.tensors[key].requires_grad


def test_digest_is_of_the_payload(publisher: Publisher) -> None:
    digest = publisher.publish(0, 1, tensors(2))
    with closing(Segment.open(publisher.name)) as reader:
        payload = torch.from_numpy(reader.payload(0).copy())
        assert digest == as_hex(buckets.digest(int(buckets.checksum(payload)), len(payload)))


def test_the_asked_version_else_the_newest(publisher: Publisher, subscriber: Subscriber) -> None:
    for version in (1, 2):
        publisher.publish(0, version, tensors(version))
    assert [subscriber.stage(0, version).version for version in (1, 2)] == [1, 2]
    publisher.publish(0, 3, tensors(3))  # over version 1
    staged = subscriber.stage(0, 1)
    assert (staged.version, values(staged.tensors)) == (3, {3.0})
    publisher.publish(1, 2, tensors(12))  # a resume: a lower version of a later incarnation
    staged = subscriber.stage(0, 1)
    assert (staged.incarnation, staged.version, values(staged.tensors)) == (1, 2, {12.0})


def test_what_is_not_there_is_an_error(publisher: Publisher, subscriber: Subscriber) -> None:
    with pytest.raises(WeightsError, match="no whole copy"):
        subscriber.stage(0, 0)
    publisher.publish(0, 1, tensors(1))
    with pytest.raises(WeightsError, match=r"version \(0, 2\) is not there; the newest is \(0, 1\)"):
        subscriber.stage(0, 2)


def test_a_staged_copy_is_private_until_the_next(publisher: Publisher, subscriber: Subscriber) -> None:
    publisher.publish(0, 1, tensors(1))
    first = subscriber.stage(0, 1)
    for version in (2, 3):
        publisher.publish(0, version, tensors(version))
    assert values(first.tensors) == {1.0}
    assert values(subscriber.stage(0, 3).tensors) == {3.0}


def test_two_memories_are_staged_in_by_turns(publisher: Publisher, subscriber: Subscriber) -> None:
    staged = []
    for version in (1, 2):
        publisher.publish(0, version, tensors(version))
        staged.append(subscriber.stage(0, version))
    assert [values(each.tensors) for each in staged] == [{1.0}, {2.0}]
    publisher.publish(0, 3, tensors(3))
    subscriber.stage(0, 3)
    assert [values(each.tensors) for each in staged] == [{3.0}, {2.0}]


def test_one_memory_is_staged_in_every_time(publisher: Publisher) -> None:
    memory = torch.empty(MANIFEST.num_bytes, dtype=torch.uint8)
    with closing(Subscriber(SharedSource(publisher.name), lambda num_bytes, device: memory)) as subscriber:
        for version in (1, 2):
            publisher.publish(0, version, tensors(version))
            assert values(subscriber.stage(0, version).tensors) == values(MANIFEST.views(memory)) == {float(version)}


class Disturbed:
    """A source that calls `disturb` after the first piece of each read."""

    def __init__(self, subscriber: Subscriber, disturb: Callable[[], object]) -> None:
        self._inner = subscriber._source
        self._disturb = disturb
        self.manifest, self.far, self.device = self._inner.manifest, self._inner.far, self._inner.device
        self.headers = self._inner.headers
        self.close = self._inner.close
        self.num_reads = 0

    def read(self, header: Header, part: Part, into: torch.Tensor) -> Iterator[tuple[slice, int]]:
        self.num_reads += 1
        for number, piece in enumerate(self._inner.read(header, part, into)):
            yield piece
            if number == 0:
                self._disturb()


def test_a_copy_overwritten_meanwhile_is_made_again(
    publisher: Publisher, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.weights.tcp.PIECES_AHEAD", 1)
    publisher.publish(0, 1, tensors(1))
    left = iter([2, 3])
    source = Disturbed(subscriber, lambda: [publisher.publish(0, v, tensors(v)) for v in left])
    staged = Subscriber(source).stage(0, 1)
    assert (staged.version, values(staged.tensors), source.num_reads) == (3, {3.0}, 2)


def is_ended_by_an_overwrite(publisher: Publisher, source: Source) -> None:
    """A read stops at the next piece."""
    publisher.publish(0, 1, tensors(1))
    with closing(source):
        landed = source.read(source.headers()[0], "payload", torch.empty(MANIFEST.num_bytes, dtype=torch.uint8))
        next(landed)
        for version in (2, 3):
            publisher.publish(0, version, tensors(version))
        with pytest.raises(Overwritten):
            next(landed)


def test_an_overwrite_ends_the_read_at_its_next_piece(publisher: Publisher) -> None:
    is_ended_by_an_overwrite(publisher, SharedSource(publisher.name))


def test_a_reader_that_is_always_overtaken_gives_up(
    publisher: Publisher, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.weights.tcp.PIECES_AHEAD", 1)
    versions = iter(range(1, 100))

    def publish() -> None:
        version = next(versions)
        publisher.publish(0, version, tensors(version))

    publish()
    source = Disturbed(subscriber, lambda: (publish(), publish()))
    with pytest.raises(WeightsError, match="no whole copy"):
        Subscriber(source).stage(0, 1)
    assert source.num_reads == ATTEMPTS


def test_a_version_half_written_is_not_seen(publisher: Publisher, subscriber: Subscriber) -> None:
    for version in (1, 2):
        publisher.publish(0, version, tensors(version))

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        yield tensors(3)[0]
        assert subscriber.stage(0, 2).version == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publisher.publish(0, 3, dying())
    staged = subscriber.stage(0, 1)  # version 1 lay in the slot of version 3
    assert (staged.version, values(staged.tensors)) == (2, {2.0})
    publisher.publish(0, 3, tensors(3))  # into the same slot
    assert values(subscriber.stage(0, 3).tensors) == {3.0}
    assert values(subscriber.stage(0, 2).tensors) == {2.0}


def test_damage_is_noticed(publisher: Publisher, subscriber: Subscriber) -> None:
    publisher.publish(0, 1, tensors(1))
    rows = publisher._payloads[0][slice(0, 1_200_000)]
    rows[1_100_000] ^= 1
    with pytest.raises(WeightsError, match="no whole copy"):
        subscriber.stage(0, 1)
    rows[1_100_000] ^= 1
    assert subscriber.stage(0, 1).version == 1
    assert publisher._segment is not None
    publisher._segment._words(0)[2] += np.uint64(1)  # the version, as a torn header would have it
    with pytest.raises(WeightsError, match="no whole copy"):
        subscriber.stage(0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tensors(1)[:2], r"published none, expected c float32\[900, 500\]"),
        ([*tensors(1), ("d", torch.zeros(1))], r"published d \[1\], expected none"),
        ([tensors(1)[1], tensors(1)[0]], r"published b \[7\], expected a"),
        ([("a", torch.zeros(1, 1000))], r"published a \[1, 1000\], expected a float32\[300, 1000\]"),
    ],
)
def test_publishing_other_tensors_names_the_first(publisher: Publisher, given: Tensors, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        publisher.publish(0, 1, given)


def test_versions_only_grow(publisher: Publisher) -> None:
    publisher.publish(1, 5, tensors(5))
    for stale in ((1, 5), (1, 4), (0, 9)):
        with pytest.raises(WeightsError, match=r"published after \(1, 5\)"):
            publisher.publish(*stale, tensors(0))


def test_too_little_shared_memory_is_the_users_error(name: str) -> None:
    with pytest.raises(ConfigError, match="MiB of /dev/shm, which has"):
        Publisher(name, Manifest.lay_out([("w", (1 << 40,), torch.float32)]))
    assert not segment.exists(name)


def test_a_name_belongs_to_one_living_job(publisher: Publisher) -> None:
    with pytest.raises(WeightsError, match="belongs to a running job"):
        Publisher(publisher.name, MANIFEST)
    publisher.publish(0, 1, tensors(1))


def test_closing_removes_the_segment_but_not_from_readers(name: str) -> None:
    publisher = Publisher(name, MANIFEST)
    publisher.publish(0, 1, tensors(1))
    subscriber = Subscriber(SharedSource(name))
    publisher.close()
    assert values(subscriber.stage(0, 1).tensors) == {1.0}
    with pytest.raises(WeightsError, match="its job has ended"):
        Segment.open(name)


def test_a_file_of_another_layout_is_refused(name: str) -> None:
    path = segment.DIRECTORY / f"{segment.PREFIX}{name}"
    try:
        for content in (b"", struct.pack("<8s", b"leeway99")):
            path.write_bytes(content)
            with pytest.raises(WeightsError, match="no segment of this layout"):
                Segment.open(name)
    finally:
        path.unlink()


def test_readers_cannot_write(publisher: Publisher) -> None:
    with closing(Segment.open(publisher.name)) as reader, pytest.raises(ValueError, match="read-only"):
        reader.payload(0)[0] = 1


def test_versions_on_disk_arrive_whole_and_old_ones_go(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    place = {"segment": name, "host": "", "address": "", "timeout_s": 5.0, "directory": str(folder)}
    with closing(Publisher(name, MANIFEST, directory=str(folder))) as publisher:
        with pytest.raises(WeightsError, match="holds no version"):
            subscribe("disk", **place)
        for version in range(9, 12):
            digest = publisher.publish(0, version, tensors(version))
        with closing(subscribe("disk", **place)) as subscriber:
            staged = subscriber.stage(0, 11)
            assert (staged.version, staged.digest, values(staged.tensors)) == (11, digest, {11.0})
            assert values(subscriber.stage(0, 10).tensors) == {10.0}
            assert len(list(folder.iterdir())) == 2
            with pytest.raises(WeightsError, match="the newest is"):
                subscriber.stage(0, 12)
            newest = folder / f"{name}-0-11.safetensors"
            content = bytearray(newest.read_bytes())
            content[-5] ^= 1
            newest.write_bytes(content)
            with pytest.raises(WeightsError, match="no whole copy"):
                subscriber.stage(0, 11)
            newest.write_bytes(content[:1000])  # as a writer that died would leave it under this name
            assert subscriber.stage(0, 10).version == 10
    assert list(folder.iterdir()) == []


def test_auto_is_shared_memory_where_it_can_be_seen(publisher: Publisher) -> None:
    with closing(Server(publisher.name, "127.0.0.1")) as server:
        address = f"tcp://127.0.0.1:{server.port}"
        for host, name, kind in (
            (host_id(), publisher.name, SharedSource),
            ("elsewhere", publisher.name, TcpSource),
            (host_id(), "unseen", TcpSource),  # a container with a /dev/shm of its own
        ):
            with closing(subscribe("auto", segment=name, host=host, address=address, timeout_s=5)) as subscriber:
                assert isinstance(subscriber._source, kind)


def test_a_server_outlives_bad_requests(publisher: Publisher) -> None:
    publisher.publish(0, 1, tensors(1))
    header = Header(1 << 20, 2, 0, 1, 0)  # a slot that does not exist
    with (
        closing(Server(publisher.name, "127.0.0.1")) as server,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as client,
    ):
        client.linger = 0
        client.connect(f"tcp://127.0.0.1:{server.port}")
        client.send(b"\xc1 no msgpack")
        client.send(msgspec.msgpack.encode({"type": "Unknown"}))
        client.send(msgspec.msgpack.encode(Read(header, 0, 100)))
        client.send(msgspec.msgpack.encode(Describe()))
        answers = [client.recv() for _ in range(2) if client.poll(5000)]
        assert answers == [b"", publisher.manifest.encode()] and server.num_refused == 2


def test_a_silent_server_is_an_error_in_time() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as deaf:
        address = f"tcp://127.0.0.1:{deaf.bind_to_random_port('tcp://127.0.0.1')}"
        with pytest.raises(WeightsError, match=rf"{address}: no answer in 0.05 s \(describe\)"):
            subscribe("tcp", segment="", host="", address=address, timeout_s=0.05)


def test_a_server_lost_in_the_middle_is_an_error_in_time(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.weights.tcp.PIECES_AHEAD", 1)
    publisher.publish(0, 1, tensors(1))
    server = Server(publisher.name, "127.0.0.1")
    address = f"tcp://127.0.0.1:{server.port}"
    with closing(subscribe("tcp", segment="", host="", address=address, timeout_s=0.2)) as subscriber:
        source = Disturbed(subscriber, server.close)
        with pytest.raises(WeightsError, match=r"no answer .*version \(0, 1\), byte \d{7}"):
            Subscriber(source).stage(0, 1)

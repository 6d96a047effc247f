"""Weights as deltas: bit for bit the whole version, and the whole version where a delta does not fit."""

import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from engine.weights import Manifest, Publisher, Subscriber, delta
from engine.weights.segment import Segment

Tensors = dict[str, torch.Tensor]
SHAPES = {"embedding": (300, 256), "scalar": (), "nothing": (0, 4), "matrix": (700, 333), "norm": (333,)}
BF16 = torch.bfloat16


def start(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}


def moved(tensors: Tensors, share: float, seed: int) -> Tensors:
    """As after a step that changes that share of the weights beyond bfloat16's rounding, and all a little."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in tensors.items():
        jumps = torch.rand(tensor.shape, generator=generator) < share
        found[name] = torch.where(jumps, tensor * 1.05 + 1e-3, tensor)
    return found


def differing(old: Tensors, new: Tensors) -> int:
    pairs = zip(old.values(), new.values(), strict=True)
    return sum(int((a.to(BF16).view(torch.int16) != b.to(BF16).view(torch.int16)).sum()) for a, b in pairs)


def same(found: Tensors, expected: Tensors) -> bool:
    return all(
        torch.equal(found[name].view(torch.int16), each.to(BF16).view(torch.int16)) for name, each in expected.items()
    )


MANIFEST = Manifest.of(start().items(), BF16)
# four pieces; blocks: two of the embedding's, one each of scalar and norm, four of the matrix's
HEAD = delta.HEAD_BYTES + 4 * delta.PIECE_BYTES + 4 * 8


def size(num_changes: int) -> int:
    """Of a delta, which ends at a multiple of 8 bytes."""
    return -(-(HEAD + delta.CHANGE_BYTES * num_changes) // 8) * 8


by_tcp = pytest.mark.parametrize("subscriber", ["tcp"], indirect=True)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with closing(Publisher(f"delta-{os.getpid()}", MANIFEST, delta=True)) as publisher:
        yield publisher


@by_tcp
def test_deltas_carry_the_changes_alone_and_give_the_whole(publisher: Publisher, subscriber: Subscriber) -> None:
    tensors = start()
    publisher.publish(0, 0, tensors.items())
    staged = subscriber.stage(0, 0)
    assert staged.num_bytes == MANIFEST.num_bytes and same(staged.tensors, tensors)
    for version, share in enumerate([0.01, 0.0, 0.1, 0.001, 0.02], start=1):
        old, tensors = tensors, moved(tensors, share, version)
        digest = publisher.publish(0, version, tensors.items())
        staged = subscriber.stage(0, version)
        assert staged.num_bytes == size(differing(old, tensors)) == publisher.delta_bytes
        assert staged.digest == digest and same(staged.tensors, tensors)


@by_tcp
def test_a_large_delta_is_not_kept_nor_the_next_looked_for(publisher: Publisher, subscriber: Subscriber) -> None:
    tensors = start()
    for version, share in enumerate([0.0, 0.01, 0.5, 0.01, 0.01]):
        tensors = moved(tensors, share, version)
        publisher.publish(0, version, tensors.items())
        staged = subscriber.stage(0, version)
        assert (staged.num_bytes == MANIFEST.num_bytes) == (version in (0, 2, 3)) and same(staged.tensors, tensors)


@by_tcp
def test_who_lacks_the_base_reads_the_whole(publisher: Publisher, subscriber: Subscriber) -> None:
    versions = [start()]
    for seed in range(1, 5):
        versions.append(moved(versions[-1], 0.01, seed))
    for version in range(4):
        publisher.publish(0, version, versions[version].items())
    late = subscriber.stage(0, 3)
    assert late.num_bytes == MANIFEST.num_bytes and same(late.tensors, versions[3])
    publisher.publish(0, 4, versions[4].items())
    assert subscriber.stage(0, 4).num_bytes == size(differing(versions[3], versions[4]))
    for version in (5, 6):  # one is missed
        publisher.publish(0, version, versions[version - 5].items())
    staged = subscriber.stage(0, 6)
    assert staged.num_bytes == MANIFEST.num_bytes and same(staged.tensors, versions[1])


@by_tcp
def test_a_base_damaged_in_memory_is_noticed_and_read_again(publisher: Publisher, subscriber: Subscriber) -> None:
    old = start()
    publisher.publish(0, 0, old.items())
    subscriber.stage(0, 0)
    new = moved(old, 0.01, 1)
    publisher.publish(0, 1, new.items())
    subscriber._copies[-1].total += 1  # as though the payload were another one
    staged = subscriber.stage(0, 1)
    assert staged.num_bytes == MANIFEST.num_bytes and same(staged.tensors, new)


@pytest.mark.parametrize("subscriber", ["shm"], indirect=True)
def test_a_near_reader_takes_the_whole(publisher: Publisher, subscriber: Subscriber) -> None:
    tensors = start()
    for version in range(2):
        publisher.publish(0, version, tensors.items())
        staged = subscriber.stage(0, version)
        assert staged.num_bytes == MANIFEST.num_bytes and same(staged.tensors, tensors)
    assert publisher.delta_bytes > 0


def test_changes_are_looked_for_less_and_less_often_where_they_are_many() -> None:
    worth = delta.Worth()
    asked = []
    for version in range(200):
        if worth.ask():
            asked.append(version)
            worth.tell(False)
    assert asked == [0, 2, 5, 10, 19, 36, 69, 134, 199]
    while not worth.ask():
        pass
    worth.tell(True)
    assert worth.ask() and worth.ask()
    worth.tell(False)
    assert [worth.ask() for _ in range(2)] == [False, True]


def test_bytes_that_are_no_delta_are_refused() -> None:
    payload = torch.zeros(MANIFEST.num_bytes, dtype=torch.uint8)
    into = torch.zeros(4096, dtype=torch.uint8)
    with closing(Publisher(f"none-{os.getpid()}", MANIFEST, delta=True)) as publisher:
        for version, tensors in enumerate([start(), moved(start(), 0.001, 1)]):
            publisher.publish(0, version, tensors.items())
        with closing(Segment.open(publisher.name)) as reader:
            newest = reader.headers()[0]
            whole = torch.from_numpy(reader.delta(newest.slot)[: newest.delta_bytes].copy())
    delta.apply(payload, whole)
    for bad in (into[:7], whole[:-1], torch.cat([whole, into[:4]]), into, torch.full_like(whole, 255)):
        with pytest.raises(ValueError, match="delta|counts|offsets|change"):
            delta.apply(payload, bad)
    random = np.random.default_rng(0)
    for _ in range(300):  # whatever it says, nothing outside the payload is written
        bad = whole.clone()
        places = random.integers(0, HEAD, 3)
        bad[places] = torch.from_numpy(random.integers(0, 256, 3).astype(np.uint8))
        try:
            delta.apply(payload, bad)
        except ValueError:
            continue

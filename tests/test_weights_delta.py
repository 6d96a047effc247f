"""Weights as deltas: bit for bit the whole version, and the whole version where a delta does not fit."""

import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from engine.weights import Manifest, Publisher, Server, Subscriber, delta, subscribe
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
HEAD = delta.HEAD_BYTES + 4 * 8  # blocks: two of the embedding's, one each of scalar and norm, four of the matrix's


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with closing(Publisher(f"delta-{os.getpid()}", MANIFEST, delta=True)) as publisher:
        yield publisher


@pytest.fixture(params=["shm", "tcp"])
def subscriber(request: pytest.FixtureRequest, publisher: Publisher) -> Iterator[Subscriber]:
    with closing(Server(publisher.name, "127.0.0.1")) as server:
        address = f"tcp://127.0.0.1:{server.port}"
        with closing(subscribe(request.param, segment=publisher.name, host="", address=address, timeout_s=5)) as it:
            yield it


def test_deltas_carry_the_changes_alone_and_give_the_whole(publisher: Publisher, subscriber: Subscriber) -> None:
    tensors = start()
    publisher.publish(0, 0, tensors.items())
    staged = subscriber.stage(0, 0)
    assert staged.num_bytes == MANIFEST.num_bytes and same(staged.tensors, tensors)
    for version, share in enumerate([0.01, 0.0, 0.1, 0.001, 0.02], start=1):
        old, tensors = tensors, moved(tensors, share, version)
        digest = publisher.publish(0, version, tensors.items())
        staged = subscriber.stage(0, version)
        assert staged.num_bytes == HEAD + 4 * differing(old, tensors) == publisher.delta_bytes
        assert staged.digest == digest and same(staged.tensors, tensors)


def test_a_delta_as_large_as_a_part_of_the_payload_is_not_kept(publisher: Publisher, subscriber: Subscriber) -> None:
    tensors = start()
    for version, share in enumerate([0.0, 0.01, 0.5, 0.01, 0.01]):
        tensors = moved(tensors, share, version)
        publisher.publish(0, version, tensors.items())
        staged = subscriber.stage(0, version)
        assert (staged.num_bytes == MANIFEST.num_bytes) == (version in (0, 2)) and same(staged.tensors, tensors)


def test_who_lacks_the_base_reads_the_whole(publisher: Publisher, subscriber: Subscriber) -> None:
    versions = [start()]
    for seed in range(1, 5):
        versions.append(moved(versions[-1], 0.01, seed))
    for version in range(4):
        publisher.publish(0, version, versions[version].items())
    late = subscriber.stage(0, 3)
    assert late.num_bytes == MANIFEST.num_bytes and same(late.tensors, versions[3])
    publisher.publish(0, 4, versions[4].items())
    assert subscriber.stage(0, 4).num_bytes == HEAD + 4 * differing(versions[3], versions[4])
    for version in (5, 6):  # one is missed
        publisher.publish(0, version, versions[version - 5].items())
    staged = subscriber.stage(0, 6)
    assert staged.num_bytes == MANIFEST.num_bytes and same(staged.tensors, versions[1])


def test_a_base_damaged_in_memory_is_noticed_and_read_again(publisher: Publisher, subscriber: Subscriber) -> None:
    old = start()
    publisher.publish(0, 0, old.items())
    subscriber.stage(0, 0)
    new = moved(old, 0.01, 1)
    publisher.publish(0, 1, new.items())
    subscriber._copies[-1].total += 1  # as though the payload were another one
    staged = subscriber.stage(0, 1)
    assert staged.num_bytes == MANIFEST.num_bytes and same(staged.tensors, new)


def test_bytes_that_are_no_delta_are_refused() -> None:
    payload = torch.zeros(MANIFEST.num_bytes, dtype=torch.uint8)
    into = torch.zeros(4096, dtype=torch.uint8)
    with closing(Publisher(f"none-{os.getpid()}", MANIFEST, delta=True)) as publisher:
        for version, tensors in enumerate([start(), moved(start(), 0.001, 1)]):
            publisher.publish(0, version, tensors.items())
        with closing(Segment.open(publisher.name)) as reader:
            newest = reader.headers()[0]
            whole = torch.from_numpy(reader.delta(newest.slot)[: newest.delta_bytes].copy())
    delta.apply(MANIFEST, payload, whole)
    for bad in (into[:0], into[:7], whole[:-1], torch.cat([whole, into[:4]]), into, torch.full_like(whole, 255)):
        with pytest.raises(ValueError, match="delta|counts|offsets|change"):
            delta.apply(MANIFEST, payload, bad)
    random = np.random.default_rng(0)
    for _ in range(300):  # whatever it says, nothing outside the payload is written
        bad = whole.clone()
        places = random.integers(8, HEAD, 3)
        bad[places] = torch.from_numpy(random.integers(0, 256, 3).astype(np.uint8))
        try:
            delta.apply(MANIFEST, payload, bad)
        except ValueError:
            continue

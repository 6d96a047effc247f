"""Sharded weights: every rank writes its own rows, and together they are what one rank would have published."""

import os
from contextlib import closing
from typing import Any

import learning
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine import parallel
from engine.blocks import Host
from engine.policy import named_tensors
from engine.weights import Manifest, Publisher, Slots, Subscriber, publish
from engine.weights.device import DeviceSource
from engine.weights.publish import digest
from engine.weights.subscribe import SharedSource

DIVISIBLE = {"even": (12, 16), "uneven": (7, 8), "one_row": (1, 64), "deep": (6, 4, 2), "vector": (96,)}
GATHERED = {"odd_vector": (5,), "odd_matrix": (3, 3)}  # not divided at multiples of 16 bytes


def model() -> nn.Module:
    torch.manual_seed(0)
    root, block = nn.Module(), nn.Module()
    for number, (name, shape) in enumerate((DIVISIBLE | GATHERED).items()):
        (root if number % 2 else block).register_parameter(name, nn.Parameter(torch.randn(shape)))
    root.block = block
    root.register_buffer("counts", torch.arange(5))
    return root


def nudge(root: nn.Module, version: int) -> None:
    """Other values at the first and the last element of every shard, of which the last are on other ranks."""
    with torch.no_grad():
        for parameter in root.parameters():
            flat = parallel.shards(parameter).view(-1)
            flat[:1] += version
            flat[-1:] -= version


def refuse_whole(self: Any, *_: object) -> Tensor:
    assert tuple(self.shape) in GATHERED.values(), f"{tuple(self.shape)} was gathered"
    return FULL_TENSOR(self)


FULL_TENSOR = DTensor.full_tensor


def publish_on_rank(
    rank: int, name: str, blind: bool, delta: bool, blocks: bool
) -> tuple[list[Any], list[str], list[int]]:
    """Three versions: what rank 0 staged of each (name -> tensor, bytes) beside the truth; digests and delta bytes on
    this rank. `blind`: the last rank does not see rank 0's memory. `blocks`: payloads lie in each rank's own."""
    root = model()
    parallel.shard(root, list(root.children()), torch.device("cpu"), mixed_precision=False, exact_root=False)
    manifest = Manifest.of(named_tensors(root), torch.bfloat16)
    if blind and rank == parallel.num_ranks() - 1:
        publish._joined = lambda name: None
    staged, digests, delta_bytes = [], [], []
    slots = Slots(Host(), named_tensors(root)) if blocks else None
    with closing(Publisher(name, manifest, delta=delta, slots=slots)) as publisher:
        source = (DeviceSource(name, Host()) if blocks else SharedSource(name)) if rank == 0 else None
        subscriber = Subscriber(source) if source is not None else None
        if source is not None:
            source.far = delta
        for version in range(3):
            nudge(root, version)
            DTensor.full_tensor = refuse_whole  # type: ignore[method-assign]
            digests.append(publisher.publish(0, version, named_tensors(root)))
            DTensor.full_tensor = FULL_TENSOR  # type: ignore[method-assign]
            delta_bytes.append(publisher.delta_bytes)
            truth = {key: parallel.whole(tensor).clone() for key, tensor in named_tensors(root)}
            if subscriber is not None:
                copy = subscriber.stage(0, version)
                staged.append(({k: v.clone() for k, v in copy.tensors.items()}, copy.num_bytes, copy.digest, truth))
        if source is not None:
            source.close()
        parallel.barrier()
    return staged, digests, delta_bytes


@pytest.mark.parametrize(
    ("num_ranks", "blind", "delta", "blocks"),
    [
        (2, False, True, False),
        (3, False, False, False),
        (3, True, True, False),
        (2, False, False, True),
        (3, True, False, True),
    ],
)
def test_ranks_write_together_what_one_would(num_ranks: int, blind: bool, delta: bool, blocks: bool) -> None:
    name = f"pieces-{os.getpid()}"
    results = learning.on_ranks(num_ranks, publish_on_rank, name, blind, delta, blocks)
    staged, digests, delta_bytes = results[0]
    assert all(each == digests for _, each, _ in results) and len(set(digests)) == 3
    for version, (tensors, num_bytes, copied, truth) in enumerate(staged):
        manifest = Manifest.of(truth.items(), torch.bfloat16)
        assert copied == digests[version] == digest(manifest, truth.items())  # by one rank, with whole tensors
        for key, tensor in truth.items():
            assert torch.equal(tensors[key], tensor.bfloat16() if tensor.is_floating_point() else tensor), key
        by_delta = delta and version > 0
        assert num_bytes == (delta_bytes[version] if by_delta else manifest.num_bytes)
    assert all(delta_bytes[1:]) == delta

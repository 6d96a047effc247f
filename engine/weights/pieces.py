"""Which learner rank writes which bytes of a version: each the rows that it holds, so that no rank ever holds a sharded
tensor whole, and none waits for another's.

A rank that does not see the memory, because it runs on another host, sends its rows to rank 0, which writes them one
piece at a time. A tensor whose rows cannot be divided at multiples of 16 bytes, which are vectors in practice, is
gathered, and rank 0 writes it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from engine import parallel
from engine.ops import buckets
from engine.weights.manifest import Entry, Manifest, WeightsError


@dataclass(frozen=True)
class Piece:
    """A part of a payload that this rank writes: `tensor`, on any device, as `dtype`, and zeros behind it."""

    tensor: Tensor
    dtype: torch.dtype
    place: slice  # bytes


def pieces(manifest: Manifest, tensors: Iterable[tuple[str, Tensor]], sees: list[bool]) -> Iterator[Piece]:
    """This rank's pieces of `tensors`, which come in manifest order, sharded over all ranks or the same on all;
    `sees[rank]`: it writes its rows itself. Called by all ranks alike.

    Raises `WeightsError` naming the first tensor that is not the manifest's.
    """
    for entry, end, given in zip_longest(manifest.entries, _ends(manifest), tensors):
        name, tensor = given if given is not None else ("none", None)
        if entry is None or tensor is None or name != entry.name or tuple(tensor.shape) != entry.shape:
            shape = "" if tensor is None else f" {list(tensor.shape)}"
            raise WeightsError(f"published {name}{shape}, expected {'none' if entry is None else entry}")
        if end > entry.offset:
            yield from _pieces(entry, end, tensor.detach(), sees)


def written(manifest: Manifest, divides: Iterable[bool], sees: list[bool]) -> list[list[slice]]:
    """The places that each rank's `pieces` have, in order, of tensors that divide their rows among all ranks or not."""
    found: list[list[slice]] = [[] for _ in sees]
    for entry, end, divided in zip(manifest.entries, _ends(manifest), divides, strict=True):
        if end > entry.offset:
            for owner, place in enumerate(_places(entry, end, divided, len(sees)) or [slice(entry.offset, end)]):
                found[owner if sees[owner] else 0].append(place)
    return found


def _ends(manifest: Manifest) -> list[int]:
    return [entry.offset for entry in manifest.entries[1:]] + [manifest.num_bytes]


def _places(entry: Entry, end: int, divided: bool, num_ranks: int) -> list[slice]:
    """The bytes of each rank's rows, in order; none where the tensor is gathered."""
    if not divided or not entry.num_bytes:
        return []
    step = -(-entry.shape[0] // num_ranks) * (entry.num_bytes // entry.shape[0])  # bytes
    if step % buckets.ALIGNMENT:
        return []
    starts = range(entry.offset, entry.offset + entry.num_bytes, step)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True)]


def _pieces(entry: Entry, end: int, tensor: Tensor, sees: list[bool]) -> Iterator[Piece]:
    places = _places(entry, end, parallel.divides_rows(tensor), len(sees))
    if not places:
        whole = parallel.whole(tensor).contiguous()
        if parallel.rank() == 0:
            yield Piece(whole, entry.torch_dtype, slice(entry.offset, end))
        return
    mine, rows = parallel.shards(tensor).contiguous(), -(-entry.shape[0] // len(sees))
    for owner, place in enumerate(places):
        writer = owner if sees[owner] else 0
        if parallel.rank() == owner == writer:
            yield Piece(mine, entry.torch_dtype, place)
        elif parallel.rank() == owner:
            parallel.send(mine.to(entry.torch_dtype), writer)
        elif parallel.rank() == writer:
            held = min(rows, entry.shape[0] - owner * rows), *entry.shape[1:]
            into = torch.empty(held, dtype=entry.torch_dtype, device=mine.device)
            yield Piece(parallel.receive(into, owner), entry.torch_dtype, place)

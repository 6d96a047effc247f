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
    ends = [entry.offset for entry in manifest.entries[1:]] + [manifest.num_bytes]
    for entry, end, given in zip_longest(manifest.entries, ends, tensors):
        name, tensor = given if given is not None else ("none", None)
        if entry is None or tensor is None or name != entry.name or tuple(tensor.shape) != entry.shape:
            shape = "" if tensor is None else f" {list(tensor.shape)}"
            raise WeightsError(f"published {name}{shape}, expected {'none' if entry is None else entry}")
        if end > entry.offset:
            yield from _pieces(entry, end, tensor.detach(), sees)


def _pieces(entry: Entry, end: int, tensor: Tensor, sees: list[bool]) -> Iterator[Piece]:
    rows = -(-entry.shape[0] // len(sees)) if parallel.divides_rows(tensor) else 0
    step = rows * (entry.num_bytes // max(1, entry.shape[0])) if rows else 0  # bytes
    if not step or step % buckets.ALIGNMENT:
        whole = parallel.whole(tensor).contiguous()
        if parallel.rank() == 0:
            yield Piece(whole, entry.torch_dtype, slice(entry.offset, end))
        return
    mine = parallel.shards(tensor).contiguous()
    for owner in range(-(-entry.num_bytes // step)):
        start = entry.offset + owner * step
        place = slice(start, min(start + step, end) if (owner + 1) * step < entry.num_bytes else end)
        writer = owner if sees[owner] else 0
        if parallel.rank() == owner == writer:
            yield Piece(mine, entry.torch_dtype, place)
        elif parallel.rank() == owner:
            parallel.send(mine.to(entry.torch_dtype), writer)
        elif parallel.rank() == writer:
            held = min(rows, entry.shape[0] - owner * rows), *entry.shape[1:]
            into = torch.empty(held, dtype=entry.torch_dtype, device=mine.device)
            yield Piece(parallel.receive(into, owner), entry.torch_dtype, place)

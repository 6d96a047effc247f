"""What changed between two versions, as bytes beside a payload.

Number of changes, uint64; then for every block of 65,536 units of 2 bytes of every tensor's place, in order, how many
of them changed, int32; then where in its block each change is, uint16; then the new units, uint16. It overwrites: the
same delta twice does no harm.
"""

from itertools import pairwise

import torch
from torch import Tensor

from engine.ops import buckets
from engine.ops.buckets import Delta
from engine.weights.manifest import Manifest

HEAD_BYTES = 8
CHANGE_BYTES = 4  # place and value


class Changes:
    """Collects the deltas of a payload's tensors in `into`, uint8, as long as there is room."""

    def __init__(self, into: Tensor):
        self._into = into
        self._deltas: list[Delta] = []
        self._num_bytes = HEAD_BYTES

    @property
    def room(self) -> int:
        """How many changes a delta may have that still fits."""
        return max(0, (len(self._into) - self._num_bytes) // CHANGE_BYTES)

    def append(self, delta: Delta) -> None:
        try:
            delta = delta.trim()
        except OverflowError:
            self._num_bytes = len(self._into) + 1
            return
        self._num_bytes += 4 * len(delta.counts) + CHANGE_BYTES * len(delta.offsets)
        self._deltas.append(delta)

    @property
    def num_bytes(self) -> int:
        """Writes all; the number of bytes, or 0 where they do not fit."""
        if self._num_bytes > len(self._into):
            return 0
        total = sum(len(delta.offsets) for delta in self._deltas)
        parts = [torch.tensor([total])]
        parts += [delta.counts for delta in self._deltas]
        parts += [delta.offsets for delta in self._deltas] + [delta.values for delta in self._deltas]
        torch.cat([part.view(torch.uint8) for part in parts], out=self._into[: self._num_bytes])
        return self._num_bytes


def apply(manifest: Manifest, payload: Tensor, encoded: Tensor) -> int:
    """Writes `encoded`, uint8 on the host, into `payload`; by how much the sum over it grows.

    Raises `ValueError` for bytes that are no delta of this manifest; the payload may then be anything.
    """
    places = [entry.offset for entry in manifest.entries] + [manifest.num_bytes]
    blocks = [-(-(end - start) // (2 * buckets.BLOCK_UNITS)) for start, end in pairwise(places)]
    num_counts = sum(blocks)
    if len(encoded) < HEAD_BYTES + 4 * num_counts:
        raise ValueError(f"delta: {len(encoded)} bytes")
    total = int(encoded[:HEAD_BYTES].view(torch.int64))
    if len(encoded) != HEAD_BYTES + 4 * num_counts + CHANGE_BYTES * total:
        raise ValueError(f"delta: {total} changes in {len(encoded)} bytes")
    counts, offsets, values = encoded[HEAD_BYTES:].split([4 * num_counts, 2 * total, 2 * total])
    per_tensor = counts.view(torch.int32).split(blocks)
    sizes = [int(part.sum()) for part in per_tensor]
    if sum(sizes) != total or min(sizes, default=0) < 0:
        raise ValueError("delta: the counts do not add up")
    split = (part.view(torch.uint16).split(sizes) for part in (offsets, values))
    grown = 0
    for (start, end), part, where, what in zip(pairwise(places), per_tensor, *split, strict=True):
        grown += int(buckets.apply_delta(payload[start:end], Delta(part, where, what), start))
    return grown

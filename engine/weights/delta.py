"""What changed between two versions, as bytes beside a payload.

A delta is chunks one after the other, one of each rank that wrote a part of the payload. A chunk: numbers of pieces, of
blocks and of changes, uint64 each; first byte and byte after the last of every piece of the payload, int64 each; then
for every block of 65,536 units of 2 bytes of every piece, in order, how many of them changed, int32; then where in its
block each change is, uint16; then the new units, uint16; then zeros up to a multiple of 8 bytes. It overwrites: the
same delta twice does no harm.
"""

from torch import Tensor, cat, int32, int64, tensor, uint8, uint16, zeros

from engine.ops import buckets
from engine.ops.buckets import Delta

HEAD_BYTES = 24
PIECE_BYTES = 16
CHANGE_BYTES = 4  # place and value
MOST_SKIPPED = 64  # versions


class Changes:
    """Collects the deltas of one rank's pieces of a payload, as long as they fit into `room` bytes."""

    def __init__(self, room: int):
        self._room = room
        self._deltas: list[Delta] = []
        self._places: list[int] = []
        self._num_bytes = HEAD_BYTES

    @property
    def room(self) -> int:
        """How many changes a delta may have that still fits."""
        return max(0, (self._room - self._num_bytes) // CHANGE_BYTES)

    @property
    def num_bytes(self) -> int:
        """Of the chunk; -1 where it does not fit."""
        return _aligned(self._num_bytes) if self._num_bytes <= self._room else -1

    def append(self, place: slice, delta: Delta) -> None:
        try:
            delta = delta.trim()
        except OverflowError:
            self._num_bytes = self._room + 1
            return
        self._num_bytes += PIECE_BYTES + 4 * len(delta.counts) + CHANGE_BYTES * len(delta.offsets)
        self._deltas.append(delta)
        self._places += [place.start, place.stop]

    def write(self, into: Tensor) -> None:
        """The chunk as the bytes of `into`, uint8 [num_bytes]."""
        counts, offsets, values = ([getattr(delta, name) for delta in self._deltas] for name in NAMES)
        totals = [len(self._deltas), sum(map(len, counts)), sum(map(len, offsets))]
        parts = [tensor(totals), tensor(self._places, dtype=int64), *counts, *offsets, *values]
        parts.append(zeros(len(into) - self._num_bytes, dtype=uint8))
        cat([part.view(uint8) for part in parts], out=into)


NAMES = ("counts", "offsets", "values")


class Worth:
    """Whether to look for changes, which costs a comparison with the version before: where too many were found the
    next version is not looked at, then the next 2, 4, ... up to `MOST_SKIPPED`."""

    def __init__(self) -> None:
        self._skip = 1
        self._left = 0

    def ask(self) -> bool:
        """Whether to look at the next version."""
        self._left -= self._left > 0
        return self._left == 0

    def tell(self, found: bool) -> None:
        """Whether the version that was looked at had few changes."""
        self._left = 0 if found else self._skip + 1
        self._skip = 1 if found else min(2 * self._skip, MOST_SKIPPED)


def apply(payload: Tensor, encoded: Tensor) -> int:
    """Writes `encoded`, uint8 on the host, into `payload`; by how much the sum over it grows.

    Raises `ValueError` for bytes that are no delta of such a payload, which may then be anything.
    """
    grown = 0
    while len(encoded):
        added, num_bytes = _apply_chunk(payload, encoded)
        encoded = encoded[num_bytes:]
        grown += added
    return grown


def _apply_chunk(payload: Tensor, encoded: Tensor) -> tuple[int, int]:
    """By how much the sum grows, and the bytes of the chunk that `encoded` begins with."""
    if len(encoded) < HEAD_BYTES:
        raise ValueError(f"delta: {len(encoded)} bytes")
    num_pieces, num_blocks, num_changes = totals = encoded[:HEAD_BYTES].view(int64).tolist()
    sizes = [PIECE_BYTES * num_pieces, 4 * num_blocks, 2 * num_changes, 2 * num_changes]
    if min(totals) < 0 or _aligned(HEAD_BYTES + sum(sizes)) > len(encoded):
        raise ValueError(f"delta: {num_changes} changes in {len(encoded)} bytes")
    places, counts, offsets, values = encoded[HEAD_BYTES : HEAD_BYTES + sum(sizes)].split(sizes)
    starts, stops = places.view(int64).view(-1, 2).T.tolist() if num_pieces else ([], [])
    blocks = [-(-(stop - start) // (2 * buckets.BLOCK_UNITS)) for start, stop in zip(starts, stops, strict=True)]
    inside = all(0 <= a < b <= len(payload) and not a % buckets.ALIGNMENT for a, b in zip(starts, stops, strict=True))
    if not inside or sum(blocks) != num_blocks:
        raise ValueError("delta: pieces that are none of the payload")
    by_piece = counts.view(int32).split(blocks)
    changes = [int(part.sum()) for part in by_piece]
    if sum(changes) != num_changes or min(changes, default=0) < 0:
        raise ValueError("delta: the counts do not add up")
    split = (part.view(uint16).split(changes) for part in (offsets, values))
    grown = sum(
        int(buckets.apply_delta(payload[start:stop], Delta(*parts), start))
        for start, stop, *parts in zip(starts, stops, by_piece, *split, strict=True)
    )
    return grown, _aligned(HEAD_BYTES + sum(sizes))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8

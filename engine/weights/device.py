"""Versions in the memory of GPUs: learner ranks and generators of one host hand them over from device to device.

Each rank has two slots in memory of its own device, for the bytes that it writes (engine.weights.pieces), one place
after the other. The segment holds a table of all ranks' places and handles instead of payloads; headers, sequences and
digests are what they are everywhere. A reader opens all slots once and copies from those of all ranks together,
wherever they lie, into memory of its own device, summing on the way; it trusts what it has as every reader does.

A sum leaves the device after the bytes that it is of, in order: so the writer commits what lies there, and the reader
looks at the header when its copy is done. Nothing waits for a reader, and what a writer that died left behind is
copied, is found damaged, or is an error of CUDA that ends the generator.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine import parallel
from engine.blocks import HANDLE_BYTES, Allocator, Block
from engine.ops import buckets
from engine.weights.manifest import Manifest, WeightsError
from engine.weights.pieces import written
from engine.weights.segment import NUM_SLOTS, Header, Part, Segment

CHUNK_BYTES = 256 << 20  # copied before the reader looks whether it was overtaken


class Share(msgspec.Struct, frozen=True):
    """What one rank writes: the places of the payload, (first byte, byte after the last), and each slot's handle."""

    places: list[tuple[int, int]]
    handles: list[bytes]

    @property
    def num_bytes(self) -> int:
        return sum(stop - start for start, stop in self.places)


class Rows:
    """A slot, seen as the payload of which it holds some places."""

    def __init__(self, slot: Tensor, places: Iterable[tuple[int, int]]):
        self._held: dict[int, Tensor] = {}
        for start, stop in places:
            self._held[start], slot = slot[: stop - start], slot[stop - start :]

    def __getitem__(self, place: slice) -> Tensor:
        return self._held[place.start]


class Slots:
    """Where this rank writes versions of `tensors`, whose values do not matter."""

    def __init__(self, allocator: Allocator, tensors: Iterable[tuple[str, Tensor]]):
        self._allocator = allocator
        self._divides = [parallel.divides_rows(tensor) for _, tensor in tensors]
        self._blocks: list[Block] = []

    def allocate(self, manifest: Manifest, sees: list[bool]) -> tuple[list[Rows], bytes]:
        """Two payloads, and the table of all ranks'; all call this alike. Raises `WeightsError`."""
        places = [[(place.start, place.stop) for place in held] for held in written(manifest, self._divides, sees)]
        mine = Share(places[parallel.rank()], [])
        try:
            self._blocks = [self._allocator.allocate(mine.num_bytes) for _ in range(NUM_SLOTS if mine.places else 0)]
        except RuntimeError as error:
            need = f"two versions need {NUM_SLOTS * mine.num_bytes >> 20} MiB of the GPU"
            raise WeightsError(f"weights.route = 'cuda_ipc': {need}; {error}") from error
        words = np.zeros((NUM_SLOTS, HANDLE_BYTES // 8), np.int64)
        for slot, block in enumerate(self._blocks):
            words[slot] = np.frombuffer(block.handle, np.int64)
        by_rank = np.array(parallel.gathered(words.ravel().tolist())).reshape(-1, *words.shape)
        shares = [
            Share(held, [handle.tobytes() for handle in handles])
            for held, handles in zip(places, by_rank, strict=True)
            if held
        ]
        return [Rows(block.tensor, mine.places) for block in self._blocks], msgspec.msgpack.encode(shares)

    def close(self) -> None:
        for block in self._blocks:
            block.close()
        self._blocks = []


@dataclass(frozen=True)
class Chunk:
    """A part of a payload, and the parts of slots, in order, of which it is made."""

    place: slice
    sources: list[Tensor]
    offsets: list[int]  # bytes, in the chunk


class DeviceSource:
    """A `Source` in the memory of GPUs of this host, read into that of `allocator.device`."""

    far = False

    def __init__(self, segment: str, allocator: Allocator):
        self._segment = Segment.open(segment)
        self.manifest, self.headers, self.device = self._segment.manifest, self._segment.headers, allocator.device
        self._blocks: list[Block] = []
        self._chunks: list[list[Chunk]] = []  # by slot
        try:
            shares = msgspec.msgpack.decode(self._segment.table(), type=list[Share])
            for slot in range(NUM_SLOTS):
                for share in shares:
                    self._blocks.append(allocator.open(share.handles[slot], share.num_bytes))
                tensors = [block.tensor for block in self._blocks[slot * len(shares) :]]
                self._chunks.append(_chunks(shares, tensors))
        except (RuntimeError, msgspec.DecodeError) as error:
            self.close()
            raise WeightsError(f"weights.route = 'cuda_ipc': {error}") from error

    def read(self, header: Header, part: Part, into: Tensor) -> Iterator[tuple[slice, int]]:
        assert part == "payload", "there are no deltas between devices"
        for chunk in self._chunks[header.slot]:
            dtypes = [torch.uint8] * len(chunk.sources)
            total = int(buckets.flatten(chunk.sources, into[chunk.place], chunk.offsets, dtypes, chunk.place.start))
            self._segment.check(header)
            yield chunk.place, total

    def close(self) -> None:
        for block in self._blocks:
            block.close()
        self._blocks, self._chunks = [], []
        self._segment.close()


def _chunks(shares: list[Share], slots: list[Tensor]) -> list[Chunk]:
    """The payload in order, in chunks of about `CHUNK_BYTES`."""
    pieces = []
    for share, slot in zip(shares, slots, strict=True):
        held = Rows(slot, share.places)
        pieces += [(start, held[slice(start, stop)]) for start, stop in share.places]
    groups: list[list[tuple[int, Tensor]]] = []
    for start, source in sorted(pieces, key=lambda piece: piece[0]):
        if not groups or start - groups[-1][0][0] >= CHUNK_BYTES:
            groups.append([])
        groups[-1].append((start, source))
    return [_chunk(group) for group in groups]


def _chunk(group: list[tuple[int, Tensor]]) -> Chunk:
    first, (last, source) = group[0][0], group[-1]
    return Chunk(
        slice(first, last + len(source)), [source for _, source in group], [start - first for start, _ in group]
    )

"""The learner's side: casts and checks a version into the segment in one pass, and lets generators see it whole.

With several ranks each writes the rows that it holds (engine.weights.pieces), and the sums over their bytes add up.
Rank 0 alone opens a slot before and commits it after all have written, so there is one writer: a rank that dies in
between leaves a slot that nobody reads.

Where weights travel as bfloat16 most steps change few of their bits, so a delta to the version before lies beside the
payload, as long as it is small; readers that hold that version take the delta, others the payload.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine import parallel
from engine.ops import buckets
from engine.weights import disk
from engine.weights.delta import Changes, Worth
from engine.weights.device import Rows, Slots
from engine.weights.manifest import Manifest, WeightsError
from engine.weights.pieces import Piece, pieces
from engine.weights.segment import NUM_SLOTS, Header, Segment, as_hex, exists, remove_stale

DELTA_SHARE = 2  # a delta larger than one part in so many of the payload is not kept: one weight in four changed
NO_SLOT = -1


class Publisher:
    """One rank's part of the writer of the segment `name`. Rank 0 creates it and removes those of dead jobs first.

    Raises `ConfigError` where shared memory is too small, `WeightsError` where a living job has the name.
    """

    def __init__(
        self, name: str, manifest: Manifest, *, delta: bool = False, directory: str = "", slots: Slots | None = None
    ) -> None:
        """With `delta` readers get small changes alone; where there is a `directory`, each version lies there too.
        With `slots` payloads lie there and not in the segment. All ranks call this alike."""
        self.name = name
        self.manifest = manifest
        self._lead = parallel.rank() == 0
        room = manifest.num_bytes // DELTA_SHARE if delta else 0
        if self._lead:
            remove_stale()
        segment = self._segment = Segment.create(name, manifest, room, payloads=not slots) if self._lead else None
        parallel.of_lead([0])  # now it is there
        if not self._lead:
            segment = self._segment = _joined(name)
        self._sees = [bool(sees) for [sees] in parallel.gathered([int(segment is not None)])]
        self._room = room // sum(self._sees) // 8 * 8  # for the delta of each rank that writes
        seen = [(segment, slot) for slot in range(NUM_SLOTS)] if segment is not None else []
        self._payloads: Sequence[Tensor | Rows] = [torch.from_numpy(segment.payload(slot)) for segment, slot in seen]
        self._slots = slots
        if slots is not None:
            self._payloads = self._outside(slots)
        self._deltas = [torch.from_numpy(segment.delta(slot)) for segment, slot in seen]
        self._directory = Path(directory) if directory else None
        self._worth = Worth()
        self._digest = 0  # of the newest version
        self.delta_bytes = 0  # of the newest version; 0 where it has none

    def _outside(self, slots: Slots) -> list[Rows]:
        """The payloads where they lie in `slots`, of which readers then know."""
        try:
            payloads, table = slots.allocate(self.manifest, self._sees)
        except WeightsError:
            if self._segment is not None:
                self._segment.close()
            raise
        if self._segment is not None and self._lead:
            self._segment.attach(table)
        return payloads

    def publish(self, incarnation: int, version: int, tensors: Iterable[tuple[str, Tensor]]) -> str:
        """Writes `tensors`, in manifest order, over the older version; the payload's digest as hex. All ranks call it
        with their shards; incarnation and version are rank 0's.

        They are cast to the manifest's dtypes, from any device. Until this returns readers see what they saw before;
        if `tensors` raises or the process dies, for good. Raises `WeightsError` naming the first tensor that is not
        the manifest's, or for a version that is not newer than the newest.
        """
        slot, base = parallel.of_lead(self._begin(incarnation, version) if self._lead else [0, 0])
        changes = Changes(self._room) if base != NO_SLOT and self._payloads else None
        before = self._payloads[base] if changes is not None else None
        parts = pieces(self.manifest, tensors, self._sees)
        total = write(self._payloads[slot] if self._payloads else None, parts, before, changes)
        written = parallel.gathered([total, 0 if changes is None else changes.num_bytes])  # all rows are
        digest = buckets.digest(sum(total for total, _ in written), self.manifest.num_bytes)
        self._keep(slot, changes, [num_bytes for _, num_bytes in written])
        if self._segment is not None and self._lead:
            if changes is not None:
                self._worth.tell(self.delta_bytes > 0)
            known = 0 if changes is None else self._digest
            self._segment.commit(slot, incarnation, version, digest, base=known, delta_bytes=self.delta_bytes)
        self._digest = digest
        if self._directory is not None and self._segment is not None and self._lead:
            whole = Header(slot, 0, incarnation, version, digest)
            disk.write(self._directory, self.name, whole, self.manifest, torch.from_numpy(self._segment.payload(slot)))
        return as_hex(digest)

    def _begin(self, incarnation: int, version: int) -> list[int]:
        """Opens a slot; and the one of the version before, where changes to it are worth looking for."""
        assert self._segment is not None
        newest = self._segment.headers()[:1]
        if newest and (incarnation, version) <= newest[0].age:
            raise WeightsError(f"version {(incarnation, version)} published after {newest[0].age}")
        slot = self._segment.begin()
        looks = bool(newest) and self._room > 0 and self._worth.ask()
        return [slot, newest[0].slot if looks else NO_SLOT]

    def _keep(self, slot: int, changes: Changes | None, sizes: list[int]) -> None:
        """Writes this rank's part of the delta, where the parts of all ranks are small enough."""
        self.delta_bytes = sum(sizes) if min(sizes) >= 0 else 0
        if self.delta_bytes:
            if changes is not None:
                start = sum(sizes[: parallel.rank()])
                changes.write(self._deltas[slot][start : start + changes.num_bytes])
            parallel.barrier()

    def close(self) -> None:
        """Removes the segment; generators that opened it keep what it held."""
        self._payloads, self._deltas = [], []
        if self._segment is not None:
            if self._slots is not None:
                self._segment.withdraw()
            self._segment.close()
        if self._slots is not None:
            self._slots.close()
        if self._directory is not None and self._lead:
            disk.remove(self._directory, self.name)


def _joined(name: str) -> Segment | None:
    """The segment that rank 0 created; none where this rank is on another host."""
    return Segment.join(name) if exists(name) else None


def digest(manifest: Manifest, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What a publish of `tensors` would return."""
    payload = torch.empty(manifest.num_bytes, dtype=torch.uint8)
    total = write(payload, pieces(manifest, tensors, [True] * parallel.num_ranks()))
    return as_hex(buckets.digest(sum(total for [total] in parallel.gathered([total])), manifest.num_bytes))


def write(
    payload: Tensor | Rows | None,
    parts: Iterable[Piece],
    before: Tensor | Rows | None = None,
    changes: Changes | None = None,
) -> int:
    """Writes `parts` into `payload`, uint8; the sum over them, int64 mod 2^64, when all of it is there. `changes` gets
    what is other than in `before`, where both are on the host. Without a payload there are no parts."""
    total, sums = 0, []
    for part in parts:
        assert payload is not None
        place, source, dtypes, start = payload[part.place], part.tensor, [part.dtype], part.place.start
        if changes is not None and before is not None and changes.num_bytes >= 0:  # else they are too many already
            place.copy_(before[part.place])
            source = source if source.is_cpu else source.to(part.dtype).cpu()
            added, delta = buckets.flatten_delta([source], place, [0], dtypes, start, changes.room)
            changes.append(part.place, delta)
            total += int(added)
            continue
        bucket = place if source.device == place.device else torch.empty_like(place, device=source.device)
        sums.append(buckets.flatten([source], bucket, [0], dtypes, start))
        if bucket is not place:
            place.copy_(bucket)
    total += int(torch.stack(sums).sum()) if sums else 0  # waits for the device, once
    return (total + 2**63) % 2**64 - 2**63

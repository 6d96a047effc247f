"""The learner's side: casts and checks a version into the segment in one pass, and lets generators see it whole.

Where weights travel as bfloat16 most steps change few of their bits, so a delta to the version before lies beside the
payload, as long as it is small; readers that hold that version take the delta, others the payload.
"""

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from engine.ops import buckets
from engine.weights import disk
from engine.weights.delta import Changes, apply
from engine.weights.manifest import Manifest, WeightsError
from engine.weights.segment import NUM_SLOTS, Header, Segment, as_hex, remove_stale

DELTA_SHARE = 2  # a delta larger than one part in so many of the payload is not kept: one weight in four changed

class Publisher:
    """The one writer of the segment `name`. Removes the segments of dead jobs first.

    Raises `ConfigError` where shared memory is too small, `WeightsError` where a living job has the name.
    """

    def __init__(self, name: str, manifest: Manifest, *, delta: bool = False, directory: str = "") -> None:
        """With `delta` readers get small changes alone; where there is a `directory`, each version lies there too."""
        remove_stale()
        self.name = name
        self.manifest = manifest
        self._segment = Segment.create(name, manifest, manifest.num_bytes // DELTA_SHARE if delta else 0)
        self._payloads = [torch.from_numpy(self._segment.payload(slot)) for slot in range(NUM_SLOTS)]
        self._deltas = [torch.from_numpy(self._segment.delta(slot)) for slot in range(NUM_SLOTS)]
        self._directory = Path(directory) if directory else None
        self._digests = [0] * NUM_SLOTS  # of what each slot holds
        self.delta_bytes = 0  # of the newest version; 0 where it has none

    def publish(self, incarnation: int, version: int, tensors: Iterable[tuple[str, Tensor]]) -> str:
        """Writes `tensors`, full and in manifest order, over the older version; the payload's digest as hex.

        They are cast to the manifest's dtypes, from any device. Until this returns readers see what they saw before;
        if `tensors` raises or the process dies, for good. Raises `WeightsError` naming the first tensor that is not
        the manifest's, or for a version that is not newer than the newest.
        """
        newest = self._segment.headers()[:1]
        if newest and (incarnation, version) <= newest[0].age:
            raise WeightsError(f"version {(incarnation, version)} published after {newest[0].age}")
        slot = self._segment.begin()
        base, self.delta_bytes = 0, 0
        if newest and self._segment.delta_room:
            base = newest[0].digest
            self._catch_up(slot, newest[0])
            changes = Changes(self._deltas[slot])
            digest = write(self.manifest, self._payloads[slot], tensors, changes)
            self.delta_bytes = changes.num_bytes
        else:
            digest = write(self.manifest, self._payloads[slot], tensors)
        self._digests[slot] = digest
        self._segment.commit(slot, incarnation, version, digest, base=base, delta_bytes=self.delta_bytes)
        if self._directory is not None:
            whole = Header(slot, 0, incarnation, version, digest)
            disk.write(self._directory, self.name, whole, self.manifest, self._payloads[slot])
        return as_hex(digest)

    def _catch_up(self, slot: int, newest: Header) -> None:
        """Makes the slot's payload that of the newest version: by its delta where that fits, else by a copy."""
        fits = newest.delta_bytes > 0 and newest.base == self._digests[slot]
        self._digests[slot] = 0
        if fits:
            apply(self.manifest, self._payloads[slot], self._deltas[newest.slot][: newest.delta_bytes])
        else:
            self._payloads[slot].copy_(self._payloads[newest.slot])

    def close(self) -> None:
        """Removes the segment; generators that opened it keep what it held."""
        self._payloads, self._deltas = [], []
        self._segment.close()
        if self._directory is not None:
            disk.remove(self._directory, self.name)


def write(
    manifest: Manifest, payload: Tensor, tensors: Iterable[tuple[str, Tensor]], changes: Changes | None = None
) -> int:
    """Makes `payload`, uint8 [manifest.num_bytes] on the host, of `tensors` as `Publisher.publish` does; its digest.
    With `changes`, which gets them, `payload` is that of the version before."""
    total = 0
    ends = [entry.offset for entry in manifest.entries[1:]] + [manifest.num_bytes]
    for entry, end, given in zip_longest(manifest.entries, ends, tensors):
        name, tensor = given if given is not None else ("none", None)
        if entry is None or tensor is None or name != entry.name or tuple(tensor.shape) != entry.shape:
            shape = "" if tensor is None else f" {list(tensor.shape)}"
            raise WeightsError(f"published {name}{shape}, expected {'none' if entry is None else entry}")
        place = payload[entry.offset : end]  # padding included
        source, dtypes = tensor.detach().contiguous(), [entry.torch_dtype]
        if changes is not None:
            source = source if source.is_cpu else source.to(entry.torch_dtype).cpu()
            added, delta = buckets.flatten_delta([source], place, [0], dtypes, entry.offset, changes.room)
            changes.append(delta)
            total += int(added)
            continue
        bucket = place if source.is_cpu else torch.empty_like(place, device=source.device)
        total += int(buckets.flatten([source], bucket, [0], dtypes, position=entry.offset))
        if bucket is not place:
            place.copy_(bucket)
    return buckets.digest(total, manifest.num_bytes)

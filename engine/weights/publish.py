"""The learner's side: casts and checks a version into the segment in one pass, and lets generators see it whole."""

from collections.abc import Iterable
from itertools import zip_longest

import torch
from torch import Tensor

from engine.ops import buckets
from engine.weights.manifest import Manifest, WeightsError
from engine.weights.segment import NUM_SLOTS, Segment, as_hex, remove_stale


class Publisher:
    """The one writer of the segment `name`. Removes the segments of dead jobs first.

    Raises `ConfigError` where shared memory is too small, `WeightsError` where a living job has the name.
    """

    def __init__(self, name: str, manifest: Manifest) -> None:
        remove_stale()
        self.name = name
        self.manifest = manifest
        self._segment = Segment.create(name, manifest)
        self._payloads = [torch.from_numpy(self._segment.payload(slot)) for slot in range(NUM_SLOTS)]

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
        digest = write(self.manifest, self._payloads[slot], tensors)
        self._segment.commit(slot, incarnation, version, digest)
        return as_hex(digest)

    def close(self) -> None:
        """Removes the segment; generators that opened it keep what it held."""
        self._payloads = []
        self._segment.close()


def write(manifest: Manifest, payload: Tensor, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Makes `payload`, uint8 [manifest.num_bytes] on the host, of `tensors` as `Publisher.publish` does; its digest."""
    total = 0
    ends = [entry.offset for entry in manifest.entries[1:]] + [manifest.num_bytes]
    for entry, end, given in zip_longest(manifest.entries, ends, tensors):
        name, tensor = given if given is not None else ("none", None)
        if entry is None or tensor is None or name != entry.name or tuple(tensor.shape) != entry.shape:
            shape = "" if tensor is None else f" {list(tensor.shape)}"
            raise WeightsError(f"published {name}{shape}, expected {'none' if entry is None else entry}")
        place = payload[entry.offset : end]  # padding included
        bucket = place if tensor.is_cpu else torch.empty_like(place, device=tensor.device)
        source = tensor.detach().contiguous()
        total += int(buckets.flatten([source], bucket, [0], [entry.torch_dtype], position=entry.offset))
        if bucket is not place:
            place.copy_(bucket)
    return buckets.digest(total, manifest.num_bytes)

"""The learner's side: casts a version into the segment, one pass a tensor, and lets generators see it whole."""

from collections.abc import Iterable
from itertools import zip_longest

import torch
import xxhash

from engine.weights.manifest import Manifest, WeightsError
from engine.weights.segment import NUM_SLOTS, Segment, remove_stale


class Publisher:
    """The one writer of the segment `name`. Removes the segments of dead jobs first.

    Raises `ConfigError` where shared memory is too small, `WeightsError` where a living job has the name.
    """

    def __init__(self, name: str, manifest: Manifest) -> None:
        remove_stale()
        self.name = name
        self.manifest = manifest
        self._segment = Segment.create(name, manifest)
        self._payloads = [self._segment.payload(slot) for slot in range(NUM_SLOTS)]
        self._views = [manifest.views(torch.from_numpy(payload)) for payload in self._payloads]

    @torch.no_grad()
    def publish(self, incarnation: int, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """Copies `tensors`, full and in manifest order, over the older version; the payload's xxh3-64 as hex.

        They are cast to the manifest's dtypes in the same pass, from any device. Until this returns readers see what
        they saw before; if `tensors` raises or the process dies, for good. Raises `WeightsError` naming the first
        tensor that is not the manifest's, or for a version that is not newer than the newest.
        """
        newest = self._segment.headers()[:1]
        if newest and (incarnation, version) <= newest[0].age:
            raise WeightsError(f"version {(incarnation, version)} published after {newest[0].age}")
        slot = self._segment.begin()
        payload, views = self._payloads[slot], self._views[slot]
        digest = xxhash.xxh3_64()
        ends = [entry.offset for entry in self.manifest.entries[1:]] + [self.manifest.num_bytes]
        for entry, end, given in zip_longest(self.manifest.entries, ends, tensors):
            name, tensor = given if given is not None else ("none", None)
            if entry is None or tensor is None or name != entry.name or tuple(tensor.shape) != entry.shape:
                shape = "" if tensor is None else f" {list(tensor.shape)}"
                raise WeightsError(f"published {name}{shape}, expected {'none' if entry is None else entry}")
            views[name].copy_(tensor)
            digest.update(payload[entry.offset : end].data)  # padding included, from the cache
        self._segment.commit(slot, incarnation, version, digest.intdigest())
        return digest.hexdigest()

    def close(self) -> None:
        """Removes the segment; generators that opened it keep what it held."""
        self._views, self._payloads = [], []
        self._segment.close()

"""The generator's side: a verified private copy of a version, made while sampling goes on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from engine.ops import buckets
from engine.weights.manifest import Manifest, WeightsError
from engine.weights.segment import Header, Overwritten, Segment, as_hex, exists, host_id
from engine.weights.tcp import TcpSource

ATTEMPTS = 8  # each lost one means that two versions were published during one copy


class Source(Protocol):
    """Where a subscriber reads: the segment itself, or a server in front of it."""

    manifest: Manifest

    def headers(self) -> list[Header]:
        """The whole versions there are now, newest first."""
        ...

    def read(self, header: Header, into: np.ndarray) -> Iterator[slice]:
        """Fills `into`, uint8 [manifest.num_bytes], yielding each piece in order as it lands. Raises `Overwritten`."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Staged:
    """A whole version that belongs to the caller: nobody else reads or writes these tensors."""

    incarnation: int
    version: int
    digest: str  # of the payload, equal to the publisher's
    tensors: dict[str, torch.Tensor]


def fresh(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


class Subscriber:
    """Stages versions from `source` in what `memory` gives for a number of bytes: uint8 [bytes], fresh, or the same
    again where what was staged before is no longer read. One call at a time; it may come from any thread."""

    def __init__(self, source: Source, memory: Callable[[int], torch.Tensor] = fresh):
        self.manifest = source.manifest
        self._source = source
        self._memory = memory

    def stage(self, incarnation: int, version: int) -> Staged:
        """(incarnation, version) if it is still there, else the newest, which is then newer.

        Copies and hashes piece by piece without the GIL, so it is meant for a thread beside the sampling one. Raises
        `WeightsError` if there is nothing so new, or if no copy came out whole in `ATTEMPTS` trials.
        """
        for _ in range(ATTEMPTS):
            header = self._choose(incarnation, version)
            if header is not None and (staged := self._copy(header)) is not None:
                return staged
        raise WeightsError(f"stage: no whole copy of version {(incarnation, version)} or newer in {ATTEMPTS} attempts")

    def close(self) -> None:
        self._source.close()

    def _choose(self, incarnation: int, version: int) -> Header | None:
        """The asked version's header, else the newest's; none if both slots changed while they were looked at."""
        asked = (incarnation, version)
        headers = self._source.headers()
        if headers and headers[0].age < asked:
            raise WeightsError(f"stage: version {asked} is not there; the newest is {headers[0].age}")
        return next((header for header in headers if header.age == asked), headers[0] if headers else None)

    def _copy(self, header: Header) -> Staged | None:
        """A private copy of the slot; none if it was overwritten meanwhile or its digest differs."""
        payload = self._memory(self.manifest.num_bytes)
        total = 0
        try:
            for piece in self._source.read(header, payload.numpy()):
                total += int(buckets.checksum(payload[piece], piece.start))
        except Overwritten:
            return None
        if buckets.digest(total, self.manifest.num_bytes) != header.digest:
            return None
        return Staged(header.incarnation, header.version, as_hex(header.digest), self.manifest.views(payload))


ROUTES: dict[str, Callable[[str, str, float], Source]] = {
    "shm": lambda segment, address, timeout_s: Segment.open(segment),
    "tcp": lambda segment, address, timeout_s: TcpSource(address, timeout_s),
}


def subscribe(
    route: Literal["auto", "shm", "tcp"], *, segment: str, host: str, address: str, timeout_s: float, **options: Any
) -> Subscriber:
    """A subscriber of the segment on `host` (a `host_id`), or of the server at `address` ("tcp://HOST:PORT").

    "auto" is "shm" where this process can see the segment, else "tcp". `timeout_s` bounds each wait for the server;
    `options` are the subscriber's. Raises `WeightsError` where neither is there.
    """
    if route == "auto":
        route = "shm" if host == host_id() and exists(segment) else "tcp"
    return Subscriber(ROUTES[route](segment, address, timeout_s), **options)

"""The generator's side: a verified private copy of a version, made while sampling goes on."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.blocks import Cuda
from engine.config import Route
from engine.keys import JoinKey
from engine.ops import buckets
from engine.weights.collective import CollectiveSource
from engine.weights.delta import apply
from engine.weights.device import DeviceSource
from engine.weights.disk import DiskSource
from engine.weights.manifest import HOST, Manifest, WeightsError
from engine.weights.segment import NUM_SLOTS, Header, Overwritten, Part, Segment, as_hex, exists, host_id, pieces
from engine.weights.tcp import TcpSource

SHARED_PIECE_BYTES = 8 << 20
ATTEMPTS = 8  # each lost one means that two versions were published during one copy


class Source(Protocol):
    """Where a subscriber reads: the segment itself, or a server in front of it."""

    manifest: Manifest
    device: torch.device  # on which it reads into memory
    far: bool  # its bytes cost more than a copy in memory does, so deltas are worth their while

    def headers(self) -> list[Header]:
        """The whole versions there are now, newest first."""
        ...

    def read(self, header: Header, part: Part, into: Tensor) -> Iterator[tuple[slice, int]]:
        """Fills `into`, uint8 [bytes of the part] on `device`, yielding each piece in order as it lands, with the sum
        over it. Raises `Overwritten`."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Staged:
    """A whole version, the caller's until a later call of `stage` writes over it: the next one where the subscriber
    has memory for one version, the one after that where it has for two."""

    incarnation: int
    version: int
    digest: str  # of the payload, equal to the publisher's
    tensors: dict[str, Tensor]
    num_bytes: int  # that travelled


Memory = Callable[[int, torch.device], Tensor]  # (bytes, where)


def fresh(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


class SharedSource:
    """A `Source` in the memory of this host: each piece is copied and summed in one pass, without the GIL."""

    far = False
    device = HOST

    def __init__(self, segment: str):
        self._segment = Segment.open(segment)
        self.manifest = self._segment.manifest
        self.headers = self._segment.headers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the memory is not writable: nothing here writes
            self._parts = {
                (part, slot): torch.from_numpy(whole(slot))
                for part, whole in (("payload", self._segment.payload), ("delta", self._segment.delta))
                for slot in range(NUM_SLOTS)
            }

    def read(self, header: Header, part: Part, into: Tensor) -> Iterator[tuple[slice, int]]:
        for piece in pieces(len(into), SHARED_PIECE_BYTES):
            source = self._parts[part, header.slot][piece]
            total = buckets.flatten([source], into[piece], [0], [torch.uint8], piece.start)
            self._segment.check(header)
            yield piece, int(total)

    def close(self) -> None:
        self._parts = {}
        self._segment.close()


class Copy:
    """A version in memory of ours."""

    def __init__(self, payload: Tensor):
        self.payload = payload
        self.total = 0  # the sum over the payload
        self.digest: int | None = None  # none while it is not whole

    def become(self, other: "Copy") -> None:
        """The same version as `other`."""
        if other is not self:
            self.payload.copy_(other.payload)
            self.total = other.total


class Subscriber:
    """Stages versions from `source` in memory of its device, which `memory` gives for a number of bytes and is asked
    for twice. The version staged last is the base of the next delta; where that is over another base, or not there, or
    the source is near, the whole version is read. One call at a time; it may come from any thread."""

    def __init__(self, source: Source, memory: Memory = fresh):
        self.manifest = source.manifest
        self._source = source
        try:
            payloads = [memory(self.manifest.num_bytes, source.device) for _ in range(2)]
        except RuntimeError as error:
            size = self.manifest.num_bytes >> 20
            raise WeightsError(f"stage: no room on {source.device} for versions of {size} MiB; {error}") from error
        given = {payload.data_ptr(): payload for payload in payloads}
        self._copies = [Copy(payload) for payload in given.values()]  # the newest is the last

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
        """The slot's version in the memory of our oldest; none if it was overwritten meanwhile or it is damaged."""
        newest, copy = self._copies[-1], self._copies[0]
        by_delta = self._source.far and header.delta_bytes > 0 and header.base == newest.digest
        copy.digest = None
        try:
            num_bytes = self._apply(header, newest, copy) if by_delta else self._read(header, copy)
        except Overwritten:
            return None
        if buckets.digest(copy.total, self.manifest.num_bytes) != header.digest:
            newest.digest = None  # in case it is the base that was damaged
            return None
        copy.digest = header.digest
        self._copies = [*self._copies[1:], copy]
        tensors = self.manifest.views(copy.payload)
        return Staged(header.incarnation, header.version, as_hex(header.digest), tensors, num_bytes)

    def _read(self, header: Header, copy: Copy) -> int:
        copy.total = 0
        for _, added in self._source.read(header, "payload", copy.payload):
            copy.total += added
        return self.manifest.num_bytes

    def _apply(self, header: Header, base: Copy, copy: Copy) -> int:
        encoded = torch.empty(header.delta_bytes, dtype=torch.uint8)
        for _ in self._source.read(header, "delta", encoded):
            pass
        copy.become(base)
        try:
            copy.total += apply(copy.payload, encoded)
        except ValueError as error:  # it was torn while it was read: no writer makes one that does not fit
            raise Overwritten from error
        return header.delta_bytes


@dataclass(frozen=True)
class Place:
    """Where a job's weights are: the segment's name, the `host_id` where it is, the address ("tcp://HOST:PORT") of the
    server in front of it, the key to that, and for the route "disk" a directory. `timeout_s` bounds each wait for the
    server, `broadcast_s` each step of a broadcast; `device` is the generator's, as a configuration names it."""

    segment: str
    host: str
    address: str
    timeout_s: float
    directory: str = ""
    key: JoinKey | None = None
    broadcast_s: float = 10.0
    device: str = "cpu"


ROUTES: dict[str, Callable[[Place], Source]] = {
    "shm": lambda place: SharedSource(place.segment),
    "tcp": lambda place: TcpSource(place.address, place.timeout_s, place.key),
    "collective": lambda place: CollectiveSource(
        place.address, place.timeout_s, place.key, place.broadcast_s, place.device
    ),
    "disk": lambda place: DiskSource(Path(place.directory), place.segment),
    "cuda_ipc": lambda place: DeviceSource(place.segment, _cuda(place)),
}


def _cuda(place: Place) -> Cuda:
    if place.host != host_id():
        raise WeightsError(f"weights.route = 'cuda_ipc': is for generators of {place.host} alone, this is {host_id()}")
    try:
        return Cuda(torch.device("cuda" if place.device == "auto" else place.device))
    except RuntimeError as error:
        raise WeightsError(f"weights.route = 'cuda_ipc': {error}") from error


def subscribe(route: Route, memory: Memory = fresh, **place: Any) -> Subscriber:
    """A subscriber at the `Place` that the keywords say, which stages in `memory`.

    "auto" is "shm" where this process can see the segment, else "tcp". Raises `WeightsError` where nothing is there.
    """
    where = Place(**place)
    if route == "auto":
        route = "shm" if where.host == host_id() and exists(where.segment) else "tcp"
    return Subscriber(ROUTES[route](where), memory)

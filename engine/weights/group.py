"""Process groups that carry broadcasts of weights: rank 0 sends, the others receive, nobody waits without an end.

A group is made for one epoch, over a store under a prefix of its own, beside whatever groups the process has by
torch.distributed's own state. Its waits end after `timeout` with a `RuntimeError`; then it is of no use any more. Bytes
arrive in its ring of buffers and are copied from there, so what a broken group receives late lies in no version.
"""
# pyright: reportPrivateImportUsage=false

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, Queue, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ops import buckets
from engine.weights.segment import pieces
from engine.weights.tcp import Call

RING = 3  # buffers: two in flight, one that is copied
AHEAD = RING - 1


class Group(Protocol):
    piece_bytes: int

    def send(self, slot: int, piece: Tensor) -> Any:
        """Starts to send `piece`, on the host and not to be written before `wait`; what to wait for."""
        ...

    def receive(self, slot: int, num_bytes: int) -> Any:
        """Starts to receive into a buffer of the ring; what to wait for."""
        ...

    def wait(self, work: Any) -> None: ...

    def landed(self, slot: int, num_bytes: int) -> Tensor:
        """What was received, uint8 [num_bytes] on the host."""
        ...

    def close(self) -> None:
        """May take until the timeout where something is under way."""
        ...


class Gloo:
    """Over TCP, from memory of the host; `address` is this host's, by which the others reach it."""

    piece_bytes = 8 << 20

    def __init__(self, store: dist.Store, call: Call, address: str, timeout: timedelta, device: str):
        kind: Any = dist.ProcessGroupGloo
        options = kind._Options()
        options._timeout, options._threads = timeout, AHEAD
        options._devices = [kind.create_device(hostname=address)]
        self._group = kind(store, call.rank, call.size, options)
        self._ring = [torch.empty(self.piece_bytes, dtype=torch.uint8) for _ in range(RING)] if call.rank else []

    def send(self, slot: int, piece: Tensor) -> Any:
        return self._group.broadcast(piece, 0)

    def receive(self, slot: int, num_bytes: int) -> Any:
        return self._group.broadcast(self._ring[slot][:num_bytes], 0)

    def wait(self, work: Any) -> None:
        work.wait()

    def landed(self, slot: int, num_bytes: int) -> Tensor:
        return self._ring[slot][:num_bytes]

    def close(self) -> None:
        del self._group  # its connections end, by which the others notice


class Nccl:
    """Between GPUs: through a buffer pinned on the host and one on `device`, on a stream of its own."""

    piece_bytes = 64 << 20  # a wait looks once a millisecond

    def __init__(self, store: dist.Store, call: Call, address: str, timeout: timedelta, device: str):
        kind: Any = dist.ProcessGroupNCCL
        options = kind.Options()
        options._timeout = timeout
        with _blocking_wait():
            self._group = kind(store, call.rank, call.size, options)
        store.set(f"here-{call.rank}", "")
        store.wait([f"here-{rank}" for rank in range(call.size)], timeout)  # NCCL would wait without an end
        self._stream = torch.cuda.Stream(device)
        self._host = [torch.empty(self.piece_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(RING)]
        self._ring = [torch.empty(self.piece_bytes, dtype=torch.uint8, device=device) for _ in range(RING)]
        torch.cuda.synchronize(device)  # the allocator may hand out memory that another stream still uses

    def send(self, slot: int, piece: Tensor) -> Any:
        host, buffer = self._host[slot][: len(piece)], self._ring[slot][: len(piece)]
        host.copy_(piece)
        with torch.cuda.stream(self._stream):
            return self._group.broadcast(buffer.copy_(host, non_blocking=True), 0)

    def receive(self, slot: int, num_bytes: int) -> Any:
        with torch.cuda.stream(self._stream):
            return self._group.broadcast(self._ring[slot][:num_bytes], 0)

    def wait(self, work: Any) -> None:
        with torch.cuda.stream(self._stream):
            work.wait()

    def landed(self, slot: int, num_bytes: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            return self._host[slot][:num_bytes].copy_(self._ring[slot][:num_bytes])

    def close(self) -> None:
        self._group.abort()  # else kernels that wait for a dead peer spin on


BACKENDS = {"gloo": Gloo, "nccl": Nccl}


def gpu(device: str) -> str:
    """Names the GPU that `device`, of a configuration, means on this host; empty where NCCL cannot use one."""
    if device == "cpu" or not torch.cuda.is_available() or not dist.is_nccl_available():
        return ""
    index = torch.device("cuda" if device == "auto" else device).index
    return str(torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index).uuid)


def backend_for(gpus: list[str]) -> str:
    """What carries weights between members that have these `gpus`: NCCL wants one for each."""
    distinct = len(set(gpus)) == len(gpus) or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    return "nccl" if all(gpus) and distinct else "gloo"


def facing(host: str) -> str:
    """This host's address on its way to `host`."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)  # sends nothing
        return probe.getsockname()[0]


def make(call: Call, host: str, address: str, timeout_s: float, device: str) -> Group:
    """The group of `call`, whose source is at `host`; waits for all its members. Raises `RuntimeError`."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, call.port, is_master=False, wait_for_workers=False, timeout=timeout)
    device = "cuda" if device == "auto" else device
    return BACKENDS[call.backend](dist.PrefixStore(f"epoch-{call.epoch}", store), call, address, timeout, device)


def send(group: Group, payload: Tensor, until: float) -> None:
    """Sends `payload`, uint8 on the host. Raises `RuntimeError`, `TimeoutError` when it is not done by `until`."""
    flying: deque[Any] = deque()
    for number, place in enumerate(pieces(len(payload), group.piece_bytes)):
        if len(flying) == AHEAD:
            group.wait(flying.popleft())
        if monotonic() > until:
            raise TimeoutError(f"{place.start} of {len(payload)} bytes were sent in time")
        flying.append(group.send(number % RING, payload[place]))
    for work in flying:
        group.wait(work)


def receive(make: Callable[[], Group], into: Tensor, until: float) -> tuple[Group, int]:
    """Fills `into`, uint8, from the group that `make` gives; that group, and the sum over what came.

    Group and ring belong to a thread that is left to itself where it is not done by `until`, a `TimeoutError` here.
    Raises `RuntimeError` as the group does.
    """
    landed: SimpleQueue[tuple[int, slice, Tensor] | Group | Exception] = SimpleQueue()
    free: Queue[int] = Queue()
    for slot in range(RING):
        free.put(slot)
    Thread(target=_receive, args=(make, len(into), free, landed, until), name="weights-group", daemon=True).start()
    total = 0
    while True:
        try:
            found = landed.get(timeout=max(0.0, until - monotonic()))
        except Empty as error:
            raise TimeoutError("it was not there in time") from error
        if isinstance(found, Exception):
            raise found
        if not isinstance(found, tuple):
            return found, total
        slot, place, piece = found
        total += _copy(piece, into[place], place.start)
        free.put(slot)


def _copy(piece: Tensor, target: Tensor, position: int) -> int:
    """The sum over it. In parts so small that torch wakes no threads, which would spin on the cores that gloo needs."""
    sums = (
        buckets.flatten([piece[part]], target[part], [0], [torch.uint8], position + part.start)
        for part in pieces(len(piece))
    )
    return sum(map(int, sums))


def _receive(
    make: Callable[[], Group], num_bytes: int, free: "Queue[int]", landed: "SimpleQueue[Any]", until: float
) -> None:
    group = None
    try:
        group = make()
        for item in _landing(group, num_bytes, free, until):
            landed.put(item)
        landed.put(group)
    except Exception as error:
        landed.put(error)
        if group is not None:
            group.close()


def _landing(group: Group, num_bytes: int, free: "Queue[int]", until: float) -> Iterator[tuple[int, slice, Tensor]]:
    """The pieces in order, each with its slot, which is put into `free` when the piece was copied."""
    flying: deque[tuple[int, slice, Any]] = deque()

    def land() -> tuple[int, slice, Tensor]:
        slot, place, work = flying.popleft()
        group.wait(work)
        return slot, place, group.landed(slot, place.stop - place.start)

    for place in pieces(num_bytes, group.piece_bytes):
        if len(flying) == AHEAD:
            yield land()
        slot = free.get(timeout=max(0.0, until - monotonic()))
        flying.append((slot, place, group.receive(slot, place.stop - place.start)))
    while flying:
        yield land()


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """A group made inside raises in `wait` what goes wrong, and has no watchdog that would end the process."""
    name, before = "TORCH_NCCL_BLOCKING_WAIT", os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before

"""The segment's bytes over TCP, for generators on other hosts.

The server is stateless: it answers `Describe`, `Look` and `Read` in order, one reply each. The client asks for a few
pieces ahead, so a slow link holds no more than those in the server's memory, and checks the whole like any reader.
`Enter`, which asks for a broadcast, is its `Caller`'s to answer, if it has one.
"""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Thread
from typing import Protocol

import msgspec
import numpy as np
import zmq
from torch import Tensor

from engine.keys import JoinKey, Lock
from engine.ops import buckets
from engine.weights.manifest import HOST, Manifest, WeightsError
from engine.weights.segment import Header, Overwritten, Part, Segment, pieces

PIECES_AHEAD = 8


class Describe(msgspec.Struct, tag=True, frozen=True):
    """Asks for the manifest; answered by its JSON."""


class Look(msgspec.Struct, tag=True, frozen=True):
    """Asks for the headers of the whole versions; answered by `list[Header]`."""


class Read(msgspec.Struct, tag=True, frozen=True):
    """Asks for bytes of a part; answered by them, or by an empty frame where the slot no longer holds `header`."""

    header: Header
    start: int
    stop: int
    part: Part = "payload"


class Enter(msgspec.Struct, tag=True, frozen=True):
    """Asks for a part by broadcast; answered by a `Call`, or by `Apart`, and that when it is known who takes part."""

    header: Header
    part: Part
    member: str  # names who asks
    epoch: int  # of the group that it still has; 0: of none
    address: str  # by which others reach it
    gpu: str  # names it; empty: none


class Call(msgspec.Struct, tag=True, frozen=True):
    """The group of a broadcast, as its source tells one of its members. Its store is at `port` of the source's host."""

    epoch: int
    rank: int  # the source's is 0
    size: int
    port: int
    backend: str


class Apart(msgspec.Struct, tag=True, frozen=True):
    """There is no broadcast for who asked."""


class Caller(Protocol):
    """Answers `Enter`; see engine.weights.collective."""

    num_broken: int

    def fileno(self) -> int: ...

    @property
    def deadline(self) -> float | None: ...

    def enter(self, client: bytes, entry: Enter, now: float) -> None: ...

    def turn(self, now: float) -> Iterator[tuple[bytes, Call | Apart]]: ...

    def close(self) -> None: ...


class Server:
    """Serves the segment `name` on a free port of the interface `bind`, from a thread of its own. With a `caller`,
    which it closes, there are broadcasts."""

    def __init__(self, name: str, bind: str, lock: Lock | None = None, caller: Caller | None = None) -> None:
        self._segment = Segment.open(name)
        self._caller = caller
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        if lock is not None:
            lock.guard(socket)
        self.port = socket.bind_to_random_port(f"tcp://{bind}")
        self.num_refused = 0  # requests that could not be read
        self._thread = Thread(target=self._serve, args=(socket,), name="weights-server", daemon=True)
        self._thread.start()

    @property
    def num_broken(self) -> int:
        """Broadcasts that came to nothing."""
        return 0 if self._caller is None else self._caller.num_broken

    def close(self) -> None:
        """After the lock's end, where there is one."""
        self._context.term()  # wakes the thread, which closes the socket
        self._thread.join()
        self._segment.close()
        if self._caller is not None:
            self._caller.close()

    def _serve(self, socket: zmq.Socket) -> None:
        decoder = msgspec.msgpack.Decoder(Describe | Look | Read | Enter)
        poller = zmq.Poller()
        for heard in filter(None, (socket, self._caller)):
            poller.register(heard, zmq.POLLIN)
        with socket, suppress(zmq.ContextTerminated):  # a socket left open would hold up `term`
            while True:
                if socket in dict(poller.poll(self._patience_ms())):
                    self._hear(socket, decoder)
                for client, answer in self._caller.turn(time.monotonic()) if self._caller else ():
                    socket.send_multipart([client, msgspec.msgpack.encode(answer)])

    def _hear(self, socket: zmq.Socket, decoder: msgspec.msgpack.Decoder) -> None:
        client, *frames = socket.recv_multipart()
        try:
            request = decoder.decode(frames[-1])
        except (msgspec.MsgspecError, IndexError):
            self.num_refused += 1
            return
        if not isinstance(request, Enter):
            socket.send_multipart([client, self._answer(request)], copy=False)
        elif self._caller is not None:
            self._caller.enter(client, request, time.monotonic())
        else:
            socket.send_multipart([client, msgspec.msgpack.encode(Apart())])

    def _patience_ms(self) -> int | None:
        deadline = None if self._caller is None else self._caller.deadline
        return None if deadline is None else max(0, math.ceil(1000 * (deadline - time.monotonic())))

    def _answer(self, request: Describe | Look | Read) -> bytes | memoryview:
        match request:
            case Describe():
                return self._segment.manifest.encode()
            case Look():
                return msgspec.msgpack.encode(self._segment.headers())
            case Read(header, start, stop, part) if header in self._segment.headers():
                return self._segment.view(header, part, slice(start, stop)).data  # if torn on its way, its digest tells
            case Read():
                return b""


class TcpSource:
    """A `Source` behind a `Server` at `address`. Every wait ends after `timeout_s` seconds with a `WeightsError`."""

    far = True
    device = HOST

    def __init__(self, address: str, timeout_s: float, key: JoinKey | None = None) -> None:
        self._address = address
        self._key = key
        self._timeout_s = timeout_s
        self._context = zmq.Context()
        self.manifest = Manifest.decode(self._ask(Describe()))

    def headers(self) -> list[Header]:
        return msgspec.msgpack.decode(self._ask(Look()), type=list[Header])

    def read(self, header: Header, part: Part, into: Tensor) -> Iterator[tuple[slice, int]]:
        places = list(pieces(len(into)))
        requests = [Read(header, place.start, place.stop, part) for place in places]
        with self._connect() as socket:  # a new connection: answers to an abandoned read die with its own
            for request in requests[:PIECES_AHEAD]:
                socket.send(msgspec.msgpack.encode(request))
            for number, place in enumerate(places):
                data = self._receive(socket, f"version {header.age}, byte {place.start}")
                if len(data) != place.stop - place.start:
                    raise Overwritten
                into.numpy()[place] = np.frombuffer(data, np.uint8)
                for request in requests[number + PIECES_AHEAD : number + PIECES_AHEAD + 1]:
                    socket.send(msgspec.msgpack.encode(request))
                yield place, int(buckets.checksum(into[place], place.start))

    def enter(self, entry: Enter, timeout_s: float) -> Call | None:
        """The group that this member is called to, if it is."""
        call = msgspec.msgpack.decode(self._ask(entry, timeout_s), type=Call | Apart)
        return call if isinstance(call, Call) else None

    def close(self) -> None:
        self._context.term()

    def _ask(self, request: Describe | Look | Enter, timeout_s: float | None = None) -> bytes:
        with self._connect() as socket:
            socket.send(msgspec.msgpack.encode(request))
            return bytes(self._receive(socket, type(request).__name__.lower(), timeout_s))

    def _connect(self) -> zmq.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        if self._key is not None:
            self._key.unlock(socket)
        socket.connect(self._address)
        return socket

    def _receive(self, socket: zmq.Socket, phase: str, timeout_s: float | None = None) -> memoryview:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if not socket.poll(int(1000 * timeout_s)):
            raise WeightsError(f"weights server {self._address}: no answer in {timeout_s} s ({phase})")
        return socket.recv(copy=False).buffer

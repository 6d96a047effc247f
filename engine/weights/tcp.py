"""The segment's bytes over TCP, for generators on other hosts.

The server is stateless: it answers `Describe`, `Look` and `Read` in order, one reply each. The client asks for a few
pieces ahead, so a slow link holds no more than those in the server's memory, and checks the whole like any reader.
"""

from collections.abc import Iterator
from contextlib import suppress
from threading import Thread

import msgspec
import numpy as np
import torch
import zmq

from engine.keys import JoinKey, Lock
from engine.ops import buckets
from engine.weights.manifest import Manifest, WeightsError
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


class Server:
    """Serves the segment `name` on a free port of the interface `bind`, from a thread of its own."""

    def __init__(self, name: str, bind: str, lock: Lock | None = None) -> None:
        self._segment = Segment.open(name)
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        if lock is not None:
            lock.guard(socket)
        self.port = socket.bind_to_random_port(f"tcp://{bind}")
        self.num_refused = 0  # requests that could not be read
        self._thread = Thread(target=self._serve, args=(socket,), name="weights-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After the lock's end, where there is one."""
        self._context.term()  # wakes the thread, which closes the socket
        self._thread.join()
        self._segment.close()

    def _serve(self, socket: zmq.Socket) -> None:
        decoder = msgspec.msgpack.Decoder(Describe | Look | Read)
        with socket, suppress(zmq.ContextTerminated):  # a socket left open would hold up `term`
            while True:
                client, *frames = socket.recv_multipart()
                try:
                    answer = self._answer(decoder.decode(frames[-1]))
                except (msgspec.MsgspecError, IndexError):
                    self.num_refused += 1
                else:
                    socket.send_multipart([client, answer], copy=False)

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

    def __init__(self, address: str, timeout_s: float, key: JoinKey | None = None) -> None:
        self._address = address
        self._key = key
        self._timeout_s = timeout_s
        self._context = zmq.Context()
        self.manifest = Manifest.decode(self._ask(Describe()))

    def headers(self) -> list[Header]:
        return msgspec.msgpack.decode(self._ask(Look()), type=list[Header])

    def read(self, header: Header, part: Part, into: np.ndarray) -> Iterator[tuple[slice, int]]:
        places = list(pieces(len(into)))
        requests = [Read(header, place.start, place.stop, part) for place in places]
        with self._connect() as socket:  # a new connection: answers to an abandoned read die with its own
            for request in requests[:PIECES_AHEAD]:
                socket.send(msgspec.msgpack.encode(request))
            for number, place in enumerate(places):
                data = self._receive(socket, f"version {header.age}, byte {place.start}")
                if len(data) != place.stop - place.start:
                    raise Overwritten
                into[place] = np.frombuffer(data, np.uint8)
                for request in requests[number + PIECES_AHEAD : number + PIECES_AHEAD + 1]:
                    socket.send(msgspec.msgpack.encode(request))
                yield place, int(buckets.checksum(torch.from_numpy(into[place]), place.start))

    def close(self) -> None:
        self._context.term()

    def _ask(self, request: Describe | Look) -> bytes:
        with self._connect() as socket:
            socket.send(msgspec.msgpack.encode(request))
            return bytes(self._receive(socket, type(request).__name__.lower()))

    def _connect(self) -> zmq.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        if self._key is not None:
            self._key.unlock(socket)
        socket.connect(self._address)
        return socket

    def _receive(self, socket: zmq.Socket, phase: str) -> memoryview:
        if not socket.poll(int(1000 * self._timeout_s)):
            raise WeightsError(f"weights server {self._address}: no answer in {self._timeout_s} s ({phase})")
        return socket.recv(copy=False).buffer

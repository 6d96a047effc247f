"""How messages travel: ZeroMQ sockets with deadlines, and the tap that records arrivals and decisions.

`Hub` is the coordinator's end (ROUTER), `Link` a peer's (DEALER). Every wait takes a deadline and watches the
processes that it depends on, so that nothing waits for a dead peer. Messages that must not be lost are kept by
their sender until acknowledged, so delivery is at least once and receivers are idempotent.
"""

import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from engine.keys import JoinKey, Lock
from engine.schema import SCHEMA_VERSION, TapRecord
from engine.wire import decode, encode

MOST_AT_ONCE = 32  # messages, of a third of a millisecond each where they are large and encrypted
LAST_WORDS_MS = 100  # in which what a process said before its end still arrives


class Silence(TimeoutError):
    """A peer did not answer within its deadline."""


class Watched(Protocol):
    """What ends a wait besides a message: a file descriptor that becomes readable, and the error that it means."""

    @property
    def fd(self) -> int: ...

    def error(self) -> Exception: ...


def _socket(kind: int, context: zmq.Context | None = None) -> zmq.Socket:
    socket = (zmq.Context.instance() if context is None else context).socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by tickets and by acknowledgement, not by the socket
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket


class Link:
    """A peer's end of the connection to the coordinator."""

    def __init__(self, incoming: Any, *, connect: str = "", identity: str = "", key: JoinKey | None = None):
        """Connects to `connect`, with `key` where that is locked, or binds a free port of the loopback interface where
        it is empty. Messages are decoded as `incoming`."""
        self.socket = _socket(zmq.DEALER)
        self._incoming = incoming
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity.encode())
        if key is not None:
            key.unlock(self.socket)
        if connect:
            self.socket.connect(connect)
            self.address = connect
        else:
            self.address = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    def send(self, message: Any) -> None:
        """Never waits. Raises `Silence` at a binding end whose peer is gone."""
        try:
            self.socket.send_multipart(encode(message), zmq.NOBLOCK, copy=False)
        except zmq.Again as error:
            raise Silence(f"{self.address}: nobody is connected") from error

    def drain(self) -> Iterator[Any]:
        """Every message that has arrived, without waiting."""
        while self.socket.poll(0):
            yield decode([frame.buffer for frame in self.socket.recv_multipart(copy=False)], self._incoming)

    def receive(self, timeout_s: float, phase: str, watch: Iterable[Watched] = ()) -> Any:
        """The next message. Raises `Silence`, which names `phase`, after `timeout_s` seconds, and a watched thing's
        own error when that happens first and nothing is left to read."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        watched = {thing.fd: thing for thing in watch}
        for fd in watched:
            poller.register(fd, zmq.POLLIN)
        ready = dict(poller.poll(round(timeout_s * 1000)))
        ended = ready.keys() & watched.keys()
        if self.socket in ready or (ended and self.socket.poll(LAST_WORDS_MS)):
            return next(self.drain())
        for fd in ended:
            raise watched[fd].error()
        raise Silence(f"{phase}: no answer for {timeout_s:g} s")

    def close(self) -> None:
        self.socket.close(linger=500)


class Hub:
    """The coordinator's end towards its generators."""

    def __init__(self, interface: str, port: int, incoming: Any, lock: Lock | None = None):
        """Binds `port` of `interface` (0: a free one). Raises `zmq.ZMQError` where it is in use."""
        self.socket = _socket(zmq.ROUTER, None if lock is None else zmq.Context())
        if lock is not None:
            lock.guard(self.socket)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a restarted generator may come back under its name
        self._incoming = incoming
        if port:
            self.socket.bind(f"tcp://{interface}:{port}")
            self.port = port
        else:
            self.port = self.socket.bind_to_random_port(f"tcp://{interface}")
        self.malformed = 0

    def drain(self) -> Iterator[tuple[str, Any, list[Any]]]:
        """(peer, message, its frames) of the messages that have arrived, at most `MOST_AT_ONCE`: who sends all the time
        must not keep the loop from its other sockets. A malformed one is counted and dropped."""
        for _ in range(MOST_AT_ONCE):
            if not self.socket.poll(0):
                return
            identity, *frames = self.socket.recv_multipart(copy=False)
            buffers = [frame.buffer for frame in frames]
            try:
                yield bytes(identity.buffer).decode(), decode(buffers, self._incoming), buffers
            except (msgspec.DecodeError, UnicodeDecodeError):
                self.malformed += 1

    def send(self, peer: str, message: Any) -> None:
        self.socket.send_multipart([peer.encode(), *encode(message)], copy=False)

    def close(self) -> None:
        self.socket.close(linger=500)


class Pump:
    """Waits for any of several sockets until a deadline, then calls the handlers of those that are ready."""

    def __init__(self, handlers: Mapping[Any, Callable[[], object]]):
        self._handlers: dict[Any, Callable[[], object]] = {}
        self._poller = zmq.Poller()
        for socket, handler in handlers.items():
            self.add(socket, handler)

    def add(self, socket: Any, handler: Callable[[], object]) -> None:
        self._handlers[socket] = handler
        self._poller.register(socket, zmq.POLLIN)

    def wait(self, until: float) -> None:
        """Returns after handling what arrived, or at monotonic time `until`."""
        milliseconds = round(max(0.0, until - time.monotonic()) * 1000)
        for socket, _ in self._poller.poll(milliseconds):
            self._handlers[socket]()


# ---- the tap -----------------------------------------------------------------------------------------------------

HEAD = struct.Struct("<II")  # magic with the schema version, number of frames
MAGIC = 0x4C570000  # "LW"
LENGTH = struct.Struct("<Q")


class Tap:
    """An append-only file of what the coordinator heard and decided, in its order. A decision is recorded before it
    is committed to the ledger, so the ledger is never ahead."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def append(self, frames: list[Any]) -> None:
        """Writes one record and hands it to the kernel, so that a killed process loses nothing."""
        self._file.write(HEAD.pack(MAGIC | SCHEMA_VERSION, len(frames)))
        for frame in frames:
            self._file.write(LENGTH.pack(memoryview(frame).nbytes))
            self._file.write(frame)
        self._file.flush()

    def sync(self) -> None:
        """Forces to disk what was appended, so that the machine's end loses none of it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_tap(path: Path) -> Iterator[TapRecord]:
    """The records that a tap holds; a torn last one (its writer was killed) ends the reading.

    Raises ValueError for another schema version.
    """
    with path.open("rb") as file:
        while len(head := file.read(HEAD.size)) == HEAD.size:
            magic, num_frames = HEAD.unpack(head)
            if magic != MAGIC | SCHEMA_VERSION:
                raise ValueError(f"{path}: schema version {magic & 0xFFFF}, this program has {SCHEMA_VERSION}")
            frames = [_frame(file) for _ in range(num_frames)]
            if any(frame is None for frame in frames):
                return
            yield decode(frames, TapRecord)


def _frame(file: Any) -> bytes | None:
    size = file.read(LENGTH.size)
    if len(size) < LENGTH.size:
        return None
    data = file.read(LENGTH.unpack(size)[0])
    return data if len(data) == LENGTH.unpack(size)[0] else None

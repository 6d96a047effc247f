"""Who may talk to a job: ZeroMQ's CURVE, which authenticates both ends of a connection and encrypts what it carries.

The coordinator makes two key pairs when it starts. The server's secret never leaves it; the server's public key and the
pair that generators share are written to the run directory, to be handed to whoever may join.
"""

import os
from pathlib import Path
from typing import Self

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from engine.config import ConfigError

VARIABLE = "LEEWAY_KEY"  # environment: what the file holds, for who has no file
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class JoinKey(msgspec.Struct, frozen=True):
    """What a generator needs to join. Who has it may join, and no one else."""

    server: str  # public
    public: str
    secret: str

    def write(self, path: Path) -> None:
        """As JSON that only the owner may read, all or nothing."""
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(self))
        part.rename(path)

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Self:
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{where}: holds no key of a job: {error}") from error

    @classmethod
    def find(cls, path: str) -> Self | None:
        """The key in the file at `path`, else in the environment; None where there is neither.

        Raises `ConfigError` for a file that others may read, or that holds no key.
        """
        if not path:
            text = os.environ.pop(VARIABLE, "")  # reward workers, which run code of others, must not inherit it
            return cls.parse(text, VARIABLE) if text else None
        try:
            mode, text = os.stat(path).st_mode, Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"--key {path}: {error.strerror}") from error
        if mode & 0o077:
            raise ConfigError(f"--key {path}: others may read it: chmod 600 {path}")
        return cls.parse(text, f"--key {path}")

    def unlock(self, socket: zmq.Socket) -> None:
        """Has `socket`, not yet connected, talk to the job's server alone, and say who it is."""
        socket.curve_serverkey = self.server.encode()
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()


class Lock:
    """The server's end: lets in who has the job's key, and counts the others."""

    def __init__(self) -> None:
        public, self._secret = zmq.curve_keypair()
        self._allowed, secret = zmq.curve_keypair()
        self.key = JoinKey(public.decode(), self._allowed.decode(), secret.decode())
        self._guards: list[ThreadAuthenticator] = []
        self._monitors: list[zmq.Socket] = []
        self._num_refused = 0

    def guard(self, socket: zmq.Socket) -> None:
        """Of `socket`, not yet bound, the only guarded one of its context."""
        guard = ThreadAuthenticator(socket.context)
        guard.start()
        guard.configure_curve_callback("*", credentials_provider=self)
        self._guards.append(guard)
        socket.curve_server = True
        socket.curve_secretkey = self._secret
        self._monitors.append(socket.get_monitor_socket(REFUSED))

    def callback(self, domain: str, key: bytes) -> bool:
        """ZeroMQ asks for every connection whether its public key, as text, is let in."""
        return key == self._allowed

    @property
    def num_refused(self) -> int:
        """Connections refused so far."""
        for monitor in self._monitors:
            while monitor.poll(0):
                recv_monitor_message(monitor)
                self._num_refused += 1
        return self._num_refused

    def close(self) -> None:
        """Before the guarded sockets' contexts end."""
        for monitor in self._monitors:
            monitor.close(0)
        for guard in self._guards:
            guard.stop()
        self._monitors, self._guards = [], []

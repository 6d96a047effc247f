"""A generator in a process of its own that is stopped in a named state of a version's way into its SGLang server.

prepare: a version is announced; stage: some of it is copied, while sampling goes on; commit: requests are aborted and
the server holds some of it (tests/halves); apply: the server holds it and nobody knows yet.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from engine import actor_loop
from engine.generators import server
from engine.generators.client import Client
from engine.schema import Applied
from engine.stream import Link
from engine.weights import segment, subscribe

STATES = ("prepare", "stage", "commit", "apply")
WAIT_S = 60.0
PIECE_BYTES = 1 << 14  # of a version of some hundred kilobytes

subscriber = sys.modules[subscribe.__module__]
_fork = multiprocessing.get_context("fork")  # a child starts in milliseconds, with torch loaded


class Held:
    """The generator, from its start to its end; as a context manager, with its end."""

    def __init__(self, state: str, arguments: list[str]):
        """`arguments` of `engine.actor_loop`; it stops in `state` once it samples, and nowhere for no state."""
        self._ours, theirs = _fork.Pipe()
        self._folder = tempfile.TemporaryDirectory()
        self._half = os.path.join(self._folder.name, "half")
        os.mkfifo(self._half)
        self._fd = os.open(self._half, os.O_RDONLY | os.O_NONBLOCK)
        half = [f"--generator.sglang.environment.LEEWAY_HALF={self._half}"] if state == "commit" else []
        self.process = _fork.Process(target=generate, args=(theirs, state, self._half, [*arguments, *half]))
        self.process.start()
        theirs.close()
        self.server, self.url = self._hear(WAIT_S)

    def _hear(self, timeout_s: float) -> Any:
        assert self._ours.poll(timeout_s), f"nothing from the generator in {timeout_s} s"
        return self._ours.recv()

    def news(self) -> Any:
        """The next version that it applied, or the state in which it stopped."""
        ready = wait([self._ours, self._fd], WAIT_S)
        assert ready, f"nothing from the generator in {WAIT_S} s"
        return "commit" if self._fd in ready else self._ours.recv()

    def release(self) -> None:
        """Lets it go on from where it stopped."""
        self._ours.send(None)

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join(WAIT_S)
        os.close(self._fd)
        self._folder.cleanup()


def generate(news: Connection, state: str, half: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["LEEWAY_PARENT"] = str(os.getppid())
    hold(news, state, half)
    sys.argv = ["actor_loop", *arguments]
    sys.exit(actor_loop.main())


def hold(news: Connection, state: str, half: str) -> None:
    """Has this process say what it applies, and stop in `state`, or its server."""
    engines: list[Any] = []
    applied: list[int] = []

    def reached(now: str) -> None:
        if now != state or not (engines and engines[0].num_running and engines[0].generated_tokens):
            return
        if now == "commit":
            Path(f"{half}.armed").touch()
        else:
            news.send(now)
            news.recv()

    def on_publish(actor: Any, message: Any) -> None:
        engines[:] = [actor._generator]
        reached("prepare")

    def on_send(link: Link, message: Any) -> None:
        if isinstance(message, Applied) and message.version not in applied:  # it is said again with every heartbeat
            applied.append(message.version)
            reached("apply")
            news.send(message.version)

    def pieces(num_bytes: int, size: int) -> Iterator[slice]:
        for number, piece in enumerate(segment.pieces(num_bytes, PIECE_BYTES)):
            if number == 3:
                reached("stage")
            yield piece

    started = server.Server.__init__

    def start(self: server.Server, *args: Any, **options: Any) -> None:
        started(self, *args, **options)
        news.send((self.pid, self.url))

    server.Server.__init__ = start  # type: ignore[method-assign]
    subscriber.pieces = pieces  # type: ignore[attr-defined]
    before(actor_loop.Actor, "_on_publish", on_publish)
    before(Client, "update", lambda *_: reached("commit"))
    before(Link, "send", on_send)


def before(owner: Any, name: str, moment: Callable[..., None]) -> None:
    """Calls `moment` before every call of `owner.name`."""
    function = getattr(owner, name)

    def both(*args: Any, **options: Any) -> Any:
        moment(*args, **options)
        return function(*args, **options)

    setattr(owner, name, both)

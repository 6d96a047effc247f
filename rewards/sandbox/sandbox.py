"""A sandbox from outside: programs go in, what they wrote and how they ended comes out."""

import socket
import weakref
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from rewards.sandbox.bubblewrap import SandboxError
from rewards.sandbox.files import content, opened, sealed, sink
from rewards.sandbox.launch import WALLS, receive
from rewards.sandbox.limits import Limits


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One run; its files go beside it. `kind` is one of the runner's KINDS."""

    kind: str
    limits: Limits = Limits()
    strict: bool = True  # False for compilers, which start processes
    entry: str = ""  # the function that is called
    changed: bool = False  # whether the caller wants to see what became of the arguments
    arguments: list[str] = []  # the compiler's command
    made: str = ""  # a file in the sandbox that goes to the run's fourth


class End(msgspec.Struct, frozen=True):
    """How a run ended: `code` as `subprocess` has it (negative for a signal), or None where the run outlasted its wall
    clock ("time") or took its sandbox with it ("died")."""

    code: int | None
    cpu_s: float = 0.0
    clean: bool = False
    stopped: str = ""


class Sandbox:
    """One bubblewrap with its runner, started when needed and again after every run that did not leave it clean.

    For one thread, which must not end before the sandbox is closed: its death kills the sandbox.
    """

    def __init__(self, walls: str = "bubblewrap"):
        self._make = WALLS[walls]
        self._resources = ExitStack()
        self._control: socket.socket | None = None
        self._is_busy = False
        self.num_starts = 0
        weakref.finalize(self, self._resources.close)

    def begin(self, job: Job, files: Sequence[int]) -> None:
        """Starts a run; `files` become its standard input, output and error, then PROGRAM, CALLS, RESULTS.

        Raises `SandboxError` where there can be no sandbox.
        """
        message = msgspec.json.encode(job)
        if self._is_busy:  # a run whose end nobody awaited: its report must not be taken for this one's
            self.close()
        self._is_busy = True
        try:
            socket.send_fds(self.start(), [message], files)
        except ConnectionError:  # it died while it had nothing to do
            self.close()
            socket.send_fds(self.start(), [message], files)

    def start(self) -> socket.socket:
        """Does nothing where the sandbox is there already. Raises `SandboxError` where there can be none."""
        if self._control is None:
            self.num_starts += 1
            self._control = self._make(self._resources)
        return self._control

    def finish(self, wall_s: float) -> End:
        """Waits for the end of the run, and makes one after `wall_s`."""
        assert self._control is not None, "a run has begun"
        message = receive(self._control, wall_s)
        self._is_busy = False
        if not message:
            self.close()
            return End(None, stopped="time" if message is None else "died")
        end = msgspec.json.decode(message, type=End)
        if not end.clean:
            self.close()
        return end

    def run(self, job: Job, files: Sequence[int]) -> End:
        self.begin(job, files)
        return self.finish(job.limits.wall_s)

    def check(self) -> None:
        """Raises `SandboxError` where not even an empty program runs."""
        with opened(sealed(b""), sink(), sink(), sealed(b"")) as files:
            end = self.run(Job(kind="script"), files)
            if end.code != 0:
                said = content(files[2], 10_000).decode(errors="replace").strip()
                raise SandboxError(f"no program runs in the sandbox: {said or end}")

    def close(self) -> None:
        """Kills everything in the sandbox; another run starts a new one."""
        self._control = None
        self._resources.close()

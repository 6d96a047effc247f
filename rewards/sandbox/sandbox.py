"""A sandbox from outside: programs go in, what they wrote and how they ended comes out."""

import fcntl
import os
import select
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import msgspec

from rewards.sandbox import bubblewrap, calls
from rewards.sandbox.bubblewrap import SandboxError
from rewards.sandbox.limits import Limits

START_S = 20.0
LONGEST_MESSAGE = 1 << 17
SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One run; its files go beside it. `kind` is one of the runner's KINDS."""

    kind: str
    limits: Limits = Limits()
    strict: bool = True  # False for compilers, which start processes
    entry: str = ""  # the function that is called
    prelude: str = ""  # source that a check runs first
    arguments: list[str] = []  # the compiler's command
    made: str = ""  # a file in the sandbox that goes to the run's fourth


class End(msgspec.Struct, frozen=True):
    """How a run ended: `code` as `subprocess` has it (negative for a signal), or None where the run outlasted its wall
    clock ("time") or took its sandbox with it ("died")."""

    code: int | None
    cpu_s: float = 0.0
    clean: bool = False
    stopped: str = ""


def sealed(content: bytes) -> int:
    """A file in memory with `content`, which nobody can change any more."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALED)
    return descriptor


def sink() -> int:
    """An empty file in memory, for a run to write to; the run's `file_bytes` bound it."""
    return os.memfd_create("output", os.MFD_CLOEXEC)


def content(descriptor: int, longest: int) -> bytes:
    """What stands in a file, wherever its position is."""
    return os.pread(descriptor, longest, 0)


class Sandbox:
    """One bubblewrap with its runner, started when needed and again after every run that did not leave it clean.

    For one thread, which must not end before the sandbox is closed: its death kills the sandbox.
    """

    def __init__(self, walls: str = "bubblewrap"):
        self._make = WALLS[walls]
        self._resources = ExitStack()
        self._control: socket.socket | None = None
        self.num_starts = 0
        weakref.finalize(self, self._resources.close)

    def begin(self, job: Job, files: Sequence[int]) -> None:
        """Starts a run; `files` become its standard input, output and error, then PROGRAM, CALLS, RESULTS.

        Raises `SandboxError` where there can be no sandbox.
        """
        message = msgspec.json.encode(job)
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
        message = _receive(self._control, wall_s)
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

    def close(self) -> None:
        """Kills everything in the sandbox; another run starts a new one."""
        self._control = None
        self._resources.close()


def _receive(control: socket.socket, timeout_s: float) -> bytes | None:
    """The next message: empty when the other side has ended, None when nothing came in time."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return None
    try:
        return control.recv(LONGEST_MESSAGE)
    except ConnectionError:
        return b""


def _start_bubblewrap(resources: ExitStack) -> socket.socket:
    """As root, root makes the walls and programs run as a user of their own; failing that, and for others, a namespace
    of users makes them possible."""
    problems = []
    for own_namespace in (False, True) if os.geteuid() == 0 else (True,):
        with ExitStack() as attempt:
            code = attempt.enter_context(open(sealed(calls.runner_filter()), "rb"))
            words = bubblewrap.command(code.fileno(), own_namespace)
            user = 0
            if os.geteuid() == 0:
                user, claim = bubblewrap.lease_user()
                attempt.enter_context(claim)
            outer = {"user": user, "group": user, "extra_groups": []} if user and own_namespace else {}
            try:
                control = _launch(attempt, words, 0 if own_namespace else user, [code.fileno()], **outer)
            except SandboxError as error:
                problems.append(str(error))
                continue
            resources.push(attempt.pop_all())
            return control
    raise SandboxError("bubblewrap cannot make a sandbox here: " + "; ".join(problems))


def _start_unsafe(resources: ExitStack) -> socket.socket:
    """No walls: the same runner with the rights of whoever started it, bounds and system-call filter apart."""
    folder = resources.enter_context(tempfile.TemporaryDirectory())
    words = [*bubblewrap.python(), str(bubblewrap.HERE / "runner.py")]
    return _launch(resources, words, 0, [], cwd=folder, env=bubblewrap.ENVIRONMENT)


WALLS: dict[str, Callable[[ExitStack], socket.socket]] = {"bubblewrap": _start_bubblewrap, "unsafe": _start_unsafe}


def _launch(resources: ExitStack, words: list[str], user: int, files: list[int], **options: object) -> socket.socket:
    """Starts `words` with the runner behind them and waits for its first word. Raises `SandboxError` with the last
    words of one that does not come up."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    errors = resources.enter_context(open(sink(), "rb"))
    with theirs:
        process = subprocess.Popen(
            [*words, str(theirs.fileno()), str(user)],
            pass_fds=[theirs.fileno(), *files],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            **options,  # type: ignore[call-overload]
        )
    resources.enter_context(ours)
    resources.callback(_kill, process)
    setup = {"filter": calls.program_filter().hex(), "own_pid": calls.OWN_PID, "packages": bubblewrap.packages()}
    with suppress(BrokenPipeError):
        ours.send(msgspec.json.encode(setup))
    if not _receive(ours, START_S):
        said = content(errors.fileno(), 2000).decode(errors="replace").strip()
        raise SandboxError(said or f"the runner did not start within {START_S:g} s")
    return ours


def _kill(process: subprocess.Popen) -> None:
    """Bubblewrap's end is that of all that is in its namespace of processes."""
    process.kill()
    process.wait()

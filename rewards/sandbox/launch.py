"""Starts what a sandbox consists of, and ends it."""

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rewards.sandbox import bubblewrap, syscalls
from rewards.sandbox.bubblewrap import SandboxError
from rewards.sandbox.files import content, sealed, sink

START_S = 20.0
END_S = 10.0
LONGEST_MESSAGE = 1 << 17


def start_bubblewrap(resources: ExitStack) -> socket.socket:
    """Raises `SandboxError` where no way of starting it works."""
    problems = []
    for way in _ways():
        with ExitStack() as attempt:
            try:
                control = _start_within(attempt, way)
            except (SandboxError, OSError) as error:
                problems.append(str(error))
                continue
            resources.push(attempt.pop_all())
            return control
    raise SandboxError("bubblewrap cannot make a sandbox here: " + "; ".join(problems))


def start_unsafe(resources: ExitStack) -> socket.socket:
    """No walls: the same runner with the rights of whoever started it, bounds and system-call filter apart."""
    folder = resources.enter_context(tempfile.TemporaryDirectory())
    words = [*bubblewrap.python(), str(bubblewrap.HERE / "runner.py")]
    packages = [*bubblewrap.packages().values()]
    control, _ = _launch(resources, words, 0, packages, [], cwd=folder, env=bubblewrap.ENVIRONMENT)
    return control


WALLS: dict[str, Callable[[ExitStack], socket.socket]] = {"bubblewrap": start_bubblewrap, "unsafe": start_unsafe}


def receive(control: socket.socket, timeout_s: float) -> bytes | None:
    """The next message: empty when the other side has ended, None when nothing came in time."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return None
    try:
        return control.recv(LONGEST_MESSAGE)
    except ConnectionError:
        return b""


class Way(NamedTuple):
    """`own_namespace`: bubblewrap makes a namespace of users, without which it must be root. `other_user`: a user that
    no other sandbox has; root needs one, because the kernel does not bound the number of root's tasks."""

    own_namespace: bool
    other_user: bool


def _ways() -> list[Way]:
    if os.geteuid() != 0:
        return [Way(own_namespace=True, other_user=False)]
    ways = [Way(own_namespace=False, other_user=True), Way(own_namespace=True, other_user=True)]
    if Path("/proc/self/uid_map").read_text().split()[1] != "0":  # root here, and an ordinary user outside
        ways.append(Way(own_namespace=True, other_user=False))
    return ways


def _start_within(resources: ExitStack, way: Way) -> socket.socket:
    code = resources.enter_context(open(sealed(syscalls.runner_filter()), "rb"))
    info = resources.enter_context(open(sink(), "rb"))
    words = bubblewrap.command(code.fileno(), info.fileno(), way.own_namespace)
    inner_user, outer = 0, {}
    if way.other_user:
        user, claim = bubblewrap.lease_user()
        resources.enter_context(claim)
        inner_user = 0 if way.own_namespace else user
        outer = {"user": user, "group": user, "extra_groups": []} if way.own_namespace else {}
    files = [code.fileno(), info.fileno()]
    control, process = _launch(resources, words, inner_user, [*bubblewrap.packages()], files, **outer)
    first = os.pidfd_open(json.loads(content(info.fileno(), LONGEST_MESSAGE))["child-pid"])
    resources.callback(_end_namespace, process, first)
    return control


def _launch(
    resources: ExitStack, words: list[str], inner_user: int, packages: list[str], files: list[int], **options: Any
) -> tuple[socket.socket, subprocess.Popen]:
    """Starts `words` with the runner behind them and waits for its first word. Raises `SandboxError` with the last
    words of one that does not come up."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    resources.enter_context(ours)
    errors = resources.enter_context(open(sink(), "rb"))
    with theirs:
        process = subprocess.Popen(
            [*words, str(theirs.fileno()), str(inner_user)],
            pass_fds=[theirs.fileno(), *files],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            **options,
        )
    resources.callback(_kill, process)
    setup = {"filter": syscalls.program_filter().hex(), "own_pid": syscalls.OWN_PID, "packages": packages}
    with suppress(BrokenPipeError):
        ours.send(msgspec.json.encode(setup))
    if not receive(ours, START_S):
        said = content(errors.fileno(), LONGEST_MESSAGE).decode(errors="replace").strip()
        raise SandboxError(said.split("\n")[-1] or f"the runner did not start within {START_S:g} s")
    return ours, process


def _end_namespace(process: subprocess.Popen, first: int) -> None:
    """Kills the `first` process of the sandbox. It is dead when all others in there are, and then bubblewrap ends."""
    with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        signal.pidfd_send_signal(first, signal.SIGKILL)
        process.wait(END_S)
    os.close(first)


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()

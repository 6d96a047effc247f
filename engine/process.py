"""Child processes: they die with their parent, their death is an event, and a supervisor may start them again."""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PARENT = "LEEWAY_PARENT"  # environment: the pid whose death ends this process
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "TORCH_NCCL_")
LONGEST_BACK_OFF_S = 30.0
STACKS = signal.SIGUSR1
MOST_QUICK_DEATHS = 5


class ProcessDied(RuntimeError):
    """A process that the job cannot do without has ended."""


def answer_with_stacks() -> None:
    """Makes this process write the stacks of all its threads to standard error at `STACKS`, and where it crashes."""
    faulthandler.enable()
    faulthandler.register(STACKS, all_threads=True)


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent dies, however that happens (`kill -9` included).

    A parent that died before this call is noticed by the pid it left in the environment.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get(PARENT)
    if expected is not None and os.getppid() != int(expected):
        os._exit(1)


def child_environment(threads: int, gpus: list[str]) -> dict[str, str]:
    """The environment of a child that is no torchrun rank, with `threads` threads for its numerical libraries; where
    `gpus` names some, it sees no others."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in TORCHRUN and not key.startswith(TORCHRUN_PREFIXES)
    }
    root = str(Path(__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH"), os.getcwd())))
    kept["OMP_NUM_THREADS"] = str(threads)
    kept[PARENT] = str(os.getpid())
    if gpus:
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return kept


class Child:
    """One child process running `python -m module arguments`; its output goes to `log`."""

    def __init__(
        self, name: str, module: str, arguments: list[str], log: Path, threads: int = 1, gpus: list[str] | None = None
    ):
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=child_environment(threads, gpus or []),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which stops its children in order
            )
        self.pid = self._process.pid
        self.fd = os.pidfd_open(self.pid)

    def exit_code(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout_s: float | None) -> int | None:
        """The exit code, or None after `timeout_s` seconds."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def dump_stacks(self) -> None:
        """Has it write the stacks of its threads to its log, before someone gives it up."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACKS)

    def error(self) -> ProcessDied:
        """What to raise when this child has ended: who, how, and its last words."""
        words = self.log.read_text(errors="replace").strip().splitlines()
        last = words[-1] if words else "it wrote nothing"
        return ProcessDied(f"{self.name} (pid {self.pid}) ended with code {self.wait(5.0)}: {last} (log: {self.log})")

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after `timeout_s` seconds; returns when it is gone."""
        if self.exit_code() is None:
            self._process.terminate()
            if self.wait(timeout_s) is None:
                self._process.kill()
                self._process.wait()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Supervisor(threading.Thread):
    """Keeps one child running: started again with growing back-off when it dies, until it ends with code 0, `stop` is
    called, or it died `MOST_QUICK_DEATHS` times in a row within `start_s` of its start, so that it may never have
    worked: then the supervisor gives up. Every death is told on standard error."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: list[str],
        log: Path,
        threads: int,
        gpus: list[str] | None = None,
        start_s: float = 180.0,
    ):
        super().__init__(name=f"supervisor of {name}", daemon=True)
        self._start_s = start_s
        self._spawn = lambda: Child(name, module, arguments, log, threads, gpus)
        self._halt_read, self._halt_write = os.pipe()
        self._end_read, self._end_write = os.pipe()
        self.fd, self._gave_up = os.pipe()  # readable once it gave up
        self.gave_up = False
        self.child: Child | None = None

    def run(self) -> None:
        try:
            self._supervise()
        finally:
            os.close(self._end_write)  # makes the read end readable: `wait` returns

    def _supervise(self) -> None:
        back_off_s, quick_deaths = 0.5, 0
        while True:
            # Spawned by this thread, whose end would kill the child: so the thread outlives it.
            self.child = self._spawn()
            started = time.monotonic()
            halted = self._wait(self.child.fd, None)
            if halted or self.child.exit_code() == 0:
                return
            quick = time.monotonic() - started < self._start_s
            quick_deaths = quick_deaths + 1 if quick else 1
            back_off_s = min(2 * back_off_s if quick else 0.5, LONGEST_BACK_OFF_S)
            if quick_deaths == MOST_QUICK_DEATHS:
                self.gave_up = True
                os.write(self._gave_up, b".")
                return
            print(f"leeway: {self.child.error()}; starting it again", file=sys.stderr, flush=True)
            self.child.stop(0.0)
            if self._wait(-1, back_off_s):
                return

    def _wait(self, pidfd: int, timeout_s: float | None) -> bool:
        """Waits for the child's end or a call of `stop`; True for the latter."""
        watched = [self._halt_read] + ([pidfd] if pidfd >= 0 else [])
        return self._halt_read in select.select(watched, [], [], timeout_s)[0]

    def error(self) -> ProcessDied:
        """What to raise when it gave up."""
        assert self.child is not None
        return ProcessDied(f"{self.child.error()}; it died {MOST_QUICK_DEATHS} times in a row")

    def wait(self, stop: "StopSignal", timeout_s: float | None = None) -> bool:
        """Whether the child has ended for good, or the job was asked to stop, within `timeout_s` seconds."""
        return bool(select.select([self._end_read, stop.fd], [], [], timeout_s)[0])

    def ask_to_stop(self) -> None:
        """Ends the supervision and asks the child to end; `stop` waits for it."""
        os.write(self._halt_write, b".")
        if self.child is not None and self.child.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child.pid, signal.SIGTERM)

    def stop(self, timeout_s: float) -> None:
        """Ends the child and the supervision."""
        self.ask_to_stop()
        self.join(timeout_s)
        if self.child is not None:
            self.child.stop(timeout_s)


class Stopped(Exception):
    """Someone asked the job to stop."""


class StopSignal:
    """SIGINT and SIGTERM as an event: `asked` for loops, `fd` for waits. From the first signal on the process has
    `limit_s` seconds to end in order; then it is ended."""

    def __init__(self, limit_s: float):
        self.asked = False
        self.fd, self._write = os.pipe()
        self._limit_s = limit_s
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.asked:
            return
        self.asked = True
        os.write(self._write, b".")
        watchdog = threading.Timer(self._limit_s, self._end)
        watchdog.daemon = True
        watchdog.start()

    def _end(self) -> None:
        late = f"leeway: not ended {self._limit_s:g} s after it was asked to; the last checkpoint is what there is"
        print(late, file=sys.stderr, flush=True)
        os._exit(1)

    def error(self) -> Stopped:
        return Stopped("asked to stop")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))

"""Real jobs: launched as a user launches them, watched through their files, and gone in the end whatever happens."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.run_directory import RunDirectory

TESTS = Path(__file__).resolve().parent
LAUNCH = TESTS.parent / "engine" / "launch.py"
SMALL = TESTS / "job.toml"
MARK = "LEEWAY_TEST_JOB"  # environment: every process of a job inherits it
POLL_S = 0.05
LONGEST_S = 600.0  # a launch or a wait within one: seconds, but minutes where others compute on the same cores
ROLES = {  # by the command line, the first that fits
    "torchrun": b"\0torch.distributed.run\0",
    "rank": b"engine/launch.py\0",
    "coordinator": b"\0engine.coordinator_loop\0",
    "generator": b"\0engine.actor_loop\0",
    "server": b"\0engine.generators.guest\0",
    "reward worker": b"\0rewards.worker\0",
}


class Job:
    """One launch. As a context manager it kills every process of the job at its end."""

    def __init__(
        self,
        run: Path,
        *arguments: str,
        ranks: int = 0,
        torchrun: tuple[str, ...] = ("--standalone",),
        config: Path = SMALL,
        before: tuple[str, ...] = (),
    ):
        """`run` is the run directory, resumed where it exists; `ranks` on this host under torchrun, 0: without it;
        `before`: what to run the command by."""
        self.run = RunDirectory(run)
        self.mark = uuid.uuid4().hex
        agent = ["-m", "torch.distributed.run", *torchrun, f"--nproc-per-node={ranks}"] if ranks else []
        place = [f"--resume={run}"] if run.exists() else [f"--run.directory={run}"]
        self.command = [*before, sys.executable, *agent, str(LAUNCH), str(config), *place, *arguments]
        self.log = run.with_name(f"{run.name}-{self.mark[:6]}.log")

    def __enter__(self) -> "Job":
        self.process = self.start(self.command)
        return self

    def __exit__(self, *failure: object) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """A process of this job, which leads a process group of its own as a shell's commands do."""
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )

    # ---- what is there ----

    def pids(self, role: str = "") -> list[int]:
        """The living processes of the job, those of `role` where it is given, oldest first."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                line, environment = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
                its_role = next((name for name, words in ROLES.items() if words in line), "other")
                if wanted in environment.split(b"\0") and role in ("", its_role):
                    found.append(pid)
        return found

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The rows of `kind` in metrics.jsonl so far."""
        text = self.run.metrics.read_text() if self.run.metrics.exists() else ""
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in rows if row["kind"] == kind]

    @property
    def version(self) -> int:
        return max((row["step"] for row in self.records("step")), default=0)

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def logged(self, name: str) -> str:
        path = self.run.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # ---- waits ----

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = LONGEST_S) -> Any:
        """What `condition` gives once that is true. Fails where the job ends before, or after `timeout_s`."""
        limit = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.printed()[-4000:]}"
            assert time.monotonic() < limit, f"no {what} within {timeout_s} s:\n{self.printed()[-4000:]}"
            time.sleep(POLL_S)
        return value

    def wait(self, timeout_s: float = LONGEST_S) -> int:
        """The exit code of the launch."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.printed()[-4000:]}") from None

    def succeed(self) -> dict[str, Any]:
        """Waits for the end, which is as usual; the summary."""
        assert self.wait() == 0, self.printed()[-4000:]
        self.is_gone(5.0)
        return json.loads(self.run.summary.read_text())

    def is_gone(self, timeout_s: float, *, shared_memory: bool = True) -> None:
        """Fails where a process of the job is there for longer than `timeout_s`, or its shared memory after that."""
        limit = time.monotonic() + timeout_s
        while left := self.pids():
            with exit_of(left[0]) as ended:
                assert select.select([ended], [], [], max(0.0, limit - time.monotonic()))[0], (
                    f"{len(left)} processes are left after {timeout_s} s:\n{self.printed()[-4000:]}"
                )
        if shared_memory:  # where the learner was killed, it lies there until the next job begins
            assert list(Path("/dev/shm").glob(f"leeway-{self.run.name}-*")) == []


@contextlib.contextmanager
def exit_of(pid: int) -> Iterator[int]:
    """A descriptor that becomes readable when the process ends, also where it has ended already."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        descriptor, writer = os.pipe()
        os.close(writer)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

"""Rewards in a pool of processes, each completion under a deadline.

A group is one task of one worker: one message there, one short message back a completion. A reward that raises,
hangs or dies costs its own completion; the rest of the group goes on in a new worker.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable
from multiprocessing.connection import Connection

import msgspec

from engine.config import Config, ConfigError
from engine.schema import Prompt
from rewards.table import resolve
from rewards.verdict import Verdict
from rewards.worker import Task

MAX_FAILED_STARTS = 3  # workers in a row that never became ready
EXIT_S = 1.0  # between a process's last word and its exit code


def check_rewards(config: Config) -> None:
    """Raises `ConfigError` for a reward that is unknown or refuses its options."""
    for number, domain in enumerate(config.domains):
        try:
            resolve(domain.reward, domain.reward_options)
        except ValueError as error:
            raise ConfigError(f"domains.{number}.reward = {domain.reward!r}: {error}") from error


class Job:
    """A group under way; its verdicts arrive in the order of its completions."""

    def __init__(self, key: Hashable, task: Task):
        self.key, self.task = key, task
        self.verdicts: list[Verdict] = []

    def rest(self) -> Task:
        """What is still to be judged."""
        return msgspec.structs.replace(self.task, completions=self.task.completions[len(self.verdicts) :])


class Worker:
    """One process and our end of its socket."""

    def __init__(self, rewards: bytes):
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # the same imports as here
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # so that what a reward starts dies with it
            )
        self.connection = Connection(ours.detach())
        self.connection.send_bytes(rewards)
        self.ready = False
        self.job: Job | None = None
        self.since = time.monotonic()  # start of the wait for its next message

    def give(self, job: Job) -> None:
        self.job, self.since = job, time.monotonic()
        try:
            self.connection.send_bytes(msgspec.msgpack.encode(job.rest()))
        except OSError:
            pass  # it died; the end of its socket says so too

    def end(self, grace_s: float = 0.0) -> str:
        """Kills the process, if it has not ended by itself within `grace_s`, and its children; says how it ended."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.connection.close()
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class Scorer:
    """Takes groups, gives verdicts; owned by one thread, which calls `poll` at least as often as deadlines matter.

    `fileno()` is readable when there is something to poll.
    """

    def __init__(self, config: Config):
        table = {domain.name: (domain.reward, domain.reward_options) for domain in config.domains}
        self._rewards = msgspec.msgpack.encode(table)
        self._deadlines = config.deadlines
        self._decoder = msgspec.msgpack.Decoder(Verdict)
        self._epoll = select.epoll()
        self._workers: dict[int, Worker] = {}  # by the descriptor of our end
        self._waiting: deque[Job] = deque()
        self._finished: list[tuple[Hashable, list[Verdict]]] = []
        self._failed_starts = 0
        self.num_restarts = 0
        for _ in range(config.generator.reward_workers):
            self._start()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def submit(self, key: Hashable, prompt: Prompt, completions: list[str]) -> None:
        """`completions` of `prompt` are to be judged; `poll` gives the verdicts back under `key`."""
        task = Task(prompt.domain, prompt.text, prompt.answer, prompt.fields, completions)
        self._waiting.append(Job(key, task))
        self._assign()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, list[Verdict]]]:
        """The groups finished since the last call, each with one verdict a completion; waits at most `timeout_s` for
        news of a worker.

        Raises `RuntimeError` where workers cannot start.
        """
        events = self._epoll.poll(timeout_s)
        while events:
            for descriptor, _ in events:
                self._hear(self._workers[descriptor])
            events = self._epoll.poll(0)
        now = time.monotonic()
        for worker in list(self._workers.values()):
            self._check_deadline(worker, now)
        self._assign()
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Kills all workers; what was not judged is forgotten."""
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()
        self._epoll.close()

    def _start(self) -> None:
        worker = Worker(self._rewards)
        self._workers[worker.connection.fileno()] = worker
        self._epoll.register(worker.connection.fileno(), select.EPOLLIN)

    def _assign(self) -> None:
        for worker in self._workers.values():
            if self._waiting and worker.ready and worker.job is None:
                worker.give(self._waiting.popleft())

    def _hear(self, worker: Worker) -> None:
        """Takes in the next message of `worker`: that it is ready, or the verdict on its next completion."""
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._replace(worker, "its process died", EXIT_S)
            return
        worker.since = time.monotonic()
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
        elif self._judged(worker.job, self._decoder.decode(message)):
            worker.job = None

    def _judged(self, job: Job | None, verdict: Verdict) -> bool:
        """Notes the verdict on the job's next completion; whether it was the last."""
        assert job is not None, "a verdict that nobody asked for"
        job.verdicts.append(verdict)
        done = len(job.verdicts) == len(job.task.completions)
        if done:
            self._finished.append((job.key, job.verdicts))
        return done

    def _check_deadline(self, worker: Worker, now: float) -> None:
        if worker.ready and worker.job is None:
            return
        limit_s = self._deadlines.reward_s if worker.ready else self._deadlines.start_s
        if now - worker.since > limit_s:
            self._replace(worker, f"no word within {limit_s:g} s")

    def _replace(self, worker: Worker, reason: str, grace_s: float = 0.0) -> None:
        """Fails the completion that `worker` was at, puts the rest of its group first and starts another worker."""
        del self._workers[worker.connection.fileno()]
        self._epoll.unregister(worker.connection.fileno())
        end = worker.end(grace_s)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                raise RuntimeError(f"{MAX_FAILED_STARTS} reward workers in a row could not start; the last: {end}")
        if worker.job is not None and not self._judged(worker.job, Verdict.failed(f"{reason} ({end})")):
            self._waiting.appendleft(worker.job)
        self.num_restarts += 1
        self._start()

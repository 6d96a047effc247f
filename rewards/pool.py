"""Rewards in a pool of processes, each completion under a deadline.

A group of completions is one task of one worker, answered one completion at a time. A reward that raises, hangs or
dies costs its own completion; the rest of the group goes on in a new worker. Groups whose reward waits go to the wide
worker, many at once: where that one dies or gets stuck nobody is blamed, but each group that it had under way goes on
alone, one completion at a time, until the guilty one has shown itself.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from rewards.verdict import Verdict
from rewards.worker import MAX_MESSAGE, Bear, Died, Judged, Kill, Loaded, RewardTable, Setup, Task

MAX_FAILED_STARTS = 3  # nurseries in a row that never bore a worker
EXIT_S = 1.0  # between a process's last word and its exit code
KILL_S = 10.0  # between a kill and the exit code; one with much memory takes its time
WIDTH = 16  # groups that the wide worker has under way


class Limits(msgspec.Struct, frozen=True):
    """Seconds to load the rewards, for one completion, for one whose reward waits; a worker's memory."""

    start_s: float = 180.0
    reward_s: float = 10.0
    wait_s: float = 600.0
    memory_gb: float = 4.0


class Job:
    """A group under way."""

    def __init__(self, key: Hashable, task: Task):
        self.key, self.task = key, task
        self.verdicts: list[Verdict | None] = [None] * len(task.completions)
        self.alone = False  # a wide worker that had it under way came to grief
        self.cancelled = False

    def missing(self) -> list[int]:
        return [sample for sample, verdict in enumerate(self.verdicts) if verdict is None]

    def rest(self, number: int) -> Task:
        """What is to be judged next, under the job's `number`."""
        samples = self.missing()[:1] if self.alone else self.missing()
        completions = [self.task.completions[sample] for sample in samples]
        return msgspec.structs.replace(self.task, completions=completions, job=number, samples=samples)


class Worker:
    """A process that judges, and our end of its socket; `pid` is 0 until it said its first word."""

    def __init__(self, wide: bool, control: socket.socket):
        self.wide, self.pid = wide, 0
        self.jobs: dict[int, Job] = {}
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(control, [msgspec.msgpack.encode(Bear(wide))], [theirs.fileno()])
        self.connection = Connection(ours.detach())
        self.since = time.monotonic()  # start of the wait for its next word

    def takes(self, job: Job) -> bool:
        if not self.pid or not self.jobs:
            return bool(self.pid)
        return self.wide and not job.alone and len(self.jobs) < WIDTH and not any(j.alone for j in self.jobs.values())

    def give(self, number: int, job: Job) -> None:
        if not self.jobs:
            self.since = time.monotonic()
        self.jobs[number] = job
        try:
            self.connection.send_bytes(msgspec.msgpack.encode(job.rest(number)))
        except OSError:
            pass  # it died; the end of its socket says so too


class Pool:
    """Takes groups, gives verdicts; owned by one thread, which calls `poll` at least as often as deadlines matter.

    `rewards` names the reward of each domain. `fileno()` is readable when there is something to poll.
    """

    def __init__(self, rewards: RewardTable, num_workers: int, limits: Limits):
        self._setup = msgspec.msgpack.encode(Setup(rewards, limits.wait_s, limits.memory_gb))
        self._num_workers, self._limits = num_workers, limits
        self._news = msgspec.msgpack.Decoder(Loaded | Died)
        self._judged = msgspec.msgpack.Decoder(Judged)
        self._epoll = select.epoll()
        self._workers: dict[int, Worker] = {}  # by the descriptor of our end
        self._queues: dict[bool, deque[Job]] = {False: deque(), True: deque()}  # by whether the reward waits
        self._unsorted: list[Job] = []  # until it is known which rewards wait
        self._waiting: list[str] | None = None
        self._codes: dict[int, int] = {}  # exit codes of the dead, by pid
        self._finished: list[tuple[Any, list[Verdict]]] = []
        self._failed_starts = self._num_jobs = 0
        self._bore = False  # whether the nursery has borne a worker that lives
        self.num_restarts = 0
        self._start()

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def pids(self) -> list[int]:
        """Of all processes that live now."""
        return [self._nursery.pid, *(worker.pid for worker in self._workers.values() if worker.pid)]

    def submit(self, key: Hashable, task: Task) -> None:
        """`task` is to be judged; `poll` gives the verdicts back under `key`."""
        self._sort(Job(key, task))
        self._assign()

    def cancel(self, key: Hashable) -> None:
        """Forgets the task under `key`, waiting or under way; an unknown one is ignored. The worker that judges it dies
        for it, unless that is the wide one, which has others under way: there it runs out."""
        self._unsorted = [job for job in self._unsorted if job.key != key]
        for waits, queue in self._queues.items():
            self._queues[waits] = deque(job for job in queue if job.key != key)
        for worker in list(self._workers.values()):
            ours = [job for job in worker.jobs.values() if job.key == key]
            for job in ours:
                job.cancelled = True
            if ours and not worker.wide:
                self._replace(worker, "cancelled")
        self._assign()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Any, list[Verdict]]]:
        """The groups finished since the last call, each with one verdict a completion; waits at most `timeout_s` for
        news of a worker.

        Raises `RuntimeError` where the rewards cannot be loaded.
        """
        events = self._epoll.poll(timeout_s)
        while events:
            for descriptor, _ in events:
                if descriptor == self._control.fileno():
                    self._hear_nursery()
                elif descriptor in self._workers:
                    self._hear(self._workers[descriptor])
            events = self._epoll.poll(0)
        self._check_deadlines(time.monotonic())
        self._assign()
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Kills all workers; what was not judged is forgotten."""
        self._end_nursery(loaded=self._waiting is not None)
        self._epoll.close()

    # ---- the nursery

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # the same imports as here
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._started, self._waiting, self._bore = time.monotonic(), None, False
        self._control.send(self._setup)
        self._epoll.register(self._control.fileno(), select.EPOLLIN)

    def _hear_nursery(self) -> None:
        if not select.select([self._control], [], [], 0)[0]:
            return  # heard already, while a worker was buried
        news = self._read_news()
        if news is None:
            self._restart_nursery("ended", self._end_nursery())
        elif isinstance(news, Loaded):
            self._waiting = news.waiting
            for wide in [False] * self._num_workers + [True] * bool(news.waiting):
                self._bear(wide)
            unsorted, self._unsorted = self._unsorted, []
            for job in unsorted:
                self._sort(job)

    def _read_news(self) -> Loaded | Died | None:
        """The nursery's next word, None where it died; notes the exit codes of the dead."""
        try:
            message = self._control.recv(MAX_MESSAGE)
        except OSError:
            message = b""
        news = self._news.decode(message) if message else None
        if isinstance(news, Died):
            self._codes[news.pid] = news.code
        return news

    def _restart_nursery(self, reason: str, end: str) -> None:
        self._failed_starts += not self._bore
        if self._failed_starts == MAX_FAILED_STARTS:
            raise RuntimeError(f"{MAX_FAILED_STARTS} reward workers in a row could not start; the last {reason}: {end}")
        self.num_restarts += 1
        self._start()

    def _end_nursery(self, loaded: bool = True) -> str:
        """While it loads the rewards it cannot hear that it is to end."""
        for worker in list(self._workers.values()):
            self._forget(worker)
            for job in worker.jobs.values():  # whose completions are at no fault
                self._settle(worker.wide, job)
        if self._control.fileno() >= 0 and not self._epoll.closed:
            self._epoll.unregister(self._control.fileno())
        self._control.close()
        try:
            code = self._nursery.wait(EXIT_S if loaded else 0.0)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            code = self._nursery.wait()
        return ending(code)

    # ---- workers

    def _bear(self, wide: bool) -> None:
        try:
            worker = Worker(wide, self._control)
        except OSError:
            return  # the nursery died; the end of its socket says so too
        self._workers[worker.connection.fileno()] = worker
        self._epoll.register(worker.connection.fileno(), select.EPOLLIN)

    def _forget(self, worker: Worker) -> None:
        del self._workers[worker.connection.fileno()]
        self._epoll.unregister(worker.connection.fileno())
        worker.connection.close()

    def _sort(self, job: Job) -> None:
        if self._waiting is None:
            self._unsorted.append(job)
        else:
            self._queues[job.task.domain in self._waiting].append(job)

    def _assign(self) -> None:
        for worker in self._workers.values():
            queue = self._queues[worker.wide]
            while queue and worker.takes(queue[0]):
                self._num_jobs += 1
                worker.give(self._num_jobs, queue.popleft())

    def _hear(self, worker: Worker) -> None:
        """Takes in the next word of `worker`: its pid at first, then verdicts, or nothing but that it lives."""
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            if worker.pid:
                self._replace(worker, "its process died", EXIT_S)
            else:
                self._restart_nursery("bore a worker that died at once", self._end_nursery())
            return
        worker.since = time.monotonic()
        if not worker.pid:
            worker.pid = msgspec.msgpack.decode(message, type=int)
            self._bore, self._failed_starts = True, 0
        elif message:
            judged = self._judged.decode(message)
            self._note(worker, judged.job, judged.sample, judged.verdict)

    def _note(self, worker: Worker, number: int, sample: int, verdict: Verdict) -> None:
        job = worker.jobs[number]
        job.verdicts[sample] = verdict
        if not job.missing() or job.alone:
            del worker.jobs[number]
            self._settle(worker.wide, job)

    def _settle(self, wide: bool, job: Job) -> None:
        """`job` left its worker: done, first in the queue again, or of no more interest."""
        if job.cancelled:
            return
        if job.missing():
            self._queues[wide].appendleft(job)
        else:
            self._finished.append((job.key, [verdict for verdict in job.verdicts if verdict is not None]))

    def _check_deadlines(self, now: float) -> None:
        if not self._bore and now - self._started > self._limits.start_s:
            end = self._end_nursery(loaded=False)
            self._restart_nursery(f"said no word within {self._limits.start_s:g} s", end)
        for worker in list(self._workers.values()):
            if worker.jobs and now - worker.since > self._limits.reward_s:
                self._replace(worker, f"no word within {self._limits.reward_s:g} s")

    def _replace(self, worker: Worker, reason: str, grace_s: float = 0.0) -> None:
        """Fails the completion that `worker` was at, if that is known, and starts another worker on the rest. Where the
        nursery is dead it is at no fault; its end will be heard next."""
        end = self._bury(worker.pid, grace_s)
        if end is None:
            return
        self._forget(worker)
        for job in worker.jobs.values():
            if job.alone or not worker.wide:
                job.verdicts[job.missing()[0]] = Verdict.failed(f"{reason} ({end})")
            job.alone = worker.wide
            self._settle(worker.wide, job)
        self.num_restarts += 1
        self._bear(worker.wide)

    def _bury(self, pid: int, grace_s: float) -> str | None:
        """Has a worker killed, if it does not end by itself within `grace_s`; says how it ended, None where the nursery
        is dead."""
        for wait_s in (grace_s, KILL_S):
            ends = time.monotonic() + wait_s
            while pid not in self._codes and select.select([self._control], [], [], max(0, ends - time.monotonic()))[0]:
                if self._read_news() is None:
                    return None
            if pid in self._codes:
                return ending(self._codes.pop(pid))
            with contextlib.suppress(OSError):
                self._control.send(msgspec.msgpack.encode(Kill(pid)))
        return "how it ended is unknown"


def ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"

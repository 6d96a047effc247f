"""The processes that judge: `python -m rewards.worker FD PARENT`, started by the pool.

It is a nursery: it loads the rewards once and then forks a worker whenever the pool asks for one, so that one which
hangs or dies is replaced in a millisecond. A worker reads tasks from a socket of its own and answers each completion
as soon as it is judged. Rewards that wait, for a judge on the network say, share one wide worker, which has many
tasks under way and says ten times a second that it is not stuck.
"""

import asyncio
import contextlib
import ctypes
import gc
import inspect
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from rewards.table import Reward, resolve, waits
from rewards.verdict import Verdict

PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 1 << 17  # between pool and nursery, in bytes
BEAT_S = 0.1  # well below any deadline of a completion
HEADER = struct.Struct("!i")  # before each message of a `Connection`: its length

RewardTable = dict[str, tuple[str, dict[str, Any]]]  # domain -> name and options of its reward


class Setup(msgspec.Struct, array_like=True):
    """The pool's first word to the nursery: time that a reward may take which waits; memory of a worker."""

    rewards: RewardTable
    wait_s: float
    memory_gb: float


class Bear(msgspec.Struct, tag=True):
    """The nursery is to fork a worker on the socket that comes with this."""

    wide: bool


class Kill(msgspec.Struct, tag=True):
    """The nursery is to kill the worker `pid`, if it still lives."""

    pid: int


class Loaded(msgspec.Struct, tag=True):
    """The nursery's first word: the domains whose rewards wait."""

    waiting: list[str]


class Died(msgspec.Struct, tag=True):
    """A worker ended, and so did all that it had started; `code` is negative for a signal."""

    pid: int
    code: int


class Task(msgspec.Struct, array_like=True):
    """Completions of one prompt; `job` and `samples` are the pool's numbers for them."""

    domain: str
    prompt: str
    answer: str
    fields: dict[str, Any]
    completions: list[str]
    job: int = 0
    samples: list[int] = []


class Judged(msgspec.Struct, array_like=True):
    job: int
    sample: int
    verdict: Verdict


# ---- the nursery -----------------------------------------------------------------------------------------------


class Nursery:
    """Forks, kills and buries workers. It never runs a reward itself, so it always answers."""

    def __init__(self, control: socket.socket, rewards: dict[str, Reward], setup: Setup):
        self._control, self._rewards, self._setup = control, rewards, setup
        self._children: set[int] = set()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Until the pool closes its end, or dies."""
        orders = msgspec.msgpack.Decoder(Bear | Kill)
        while True:
            for ready in select.select([self._control, self._wake_read], [], [])[0]:
                if ready == self._wake_read:
                    os.read(self._wake_read, MAX_MESSAGE)
                    self._bury()
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 1)
                if not message:
                    for pid in self._children:
                        os.killpg(pid, signal.SIGKILL)
                    return
                self._obey(orders.decode(message), descriptors)

    def _obey(self, order: Bear | Kill, descriptors: list[int]) -> None:
        if isinstance(order, Bear):
            self._bear(order.wide, descriptors[0])
        elif order.pid in self._children:  # not buried, so the number is still its own
            os.killpg(order.pid, signal.SIGKILL)

    def _bear(self, wide: bool, descriptor: int) -> None:
        nursery = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            die_with(nursery)
            self._control.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._wake_read)
            os.close(self._wake_write)
            memory = round(self._setup.memory_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
            live(wide, descriptor, self._rewards, self._setup.wait_s)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # both do it: neither knows who is first
        self._children.add(pid)
        os.close(descriptor)

    def _bury(self) -> None:
        while self._children:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ended.si_pid, signal.SIGKILL)  # what it started; until it is buried the number is its own
            _, status = os.waitpid(ended.si_pid, 0)
            self._children.discard(ended.si_pid)
            self._control.send(msgspec.msgpack.encode(Died(ended.si_pid, os.waitstatus_to_exitcode(status))))


def die_with(parent: int) -> None:
    """This process is killed when `parent`, which started it, dies; 0 undoes it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if parent else 0)
    if parent and os.getppid() != parent:  # it died before the line above
        os._exit(1)


# ---- a worker --------------------------------------------------------------------------------------------------


def live(wide: bool, descriptor: int, rewards: dict[str, Reward], wait_s: float) -> None:
    """A worker's life; does not return."""
    code = 1
    try:
        if wide:
            asyncio.run(attend(socket.socket(fileno=descriptor), rewards, wait_s))
        else:
            serve(Connection(descriptor), rewards)
        code = 0
    except ConnectionError:
        pass  # the pool closed
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(connection: Connection, rewards: dict[str, Reward]) -> None:
    """Judges one completion after the other until the pool closes the socket."""
    connection.send_bytes(msgspec.msgpack.encode(os.getpid()))
    tasks, encoder = msgspec.msgpack.Decoder(Task), msgspec.msgpack.Encoder()
    while True:
        try:
            task = tasks.decode(connection.recv_bytes())
        except EOFError:
            return
        for sample, completion in zip(task.samples, task.completions, strict=True):
            verdict = judge(rewards[task.domain], task, completion)
            connection.send_bytes(encoder.encode(Judged(task.job, sample, verdict)))


async def attend(connection: socket.socket, rewards: dict[str, Reward], wait_s: float) -> None:
    """Judges all that comes at once until the pool closes the socket."""
    reader, writer = await asyncio.open_connection(sock=connection)

    def say(message: bytes) -> None:
        writer.write(HEADER.pack(len(message)) + message)

    async def beat() -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            say(b"")

    async def answer(task: Task, sample: int, completion: str) -> None:
        verdict = await ask(rewards[task.domain], task, completion, wait_s)
        say(msgspec.msgpack.encode(Judged(task.job, sample, verdict)))

    say(msgspec.msgpack.encode(os.getpid()))
    under_way = {asyncio.create_task(beat())}
    tasks = msgspec.msgpack.Decoder(Task)
    while True:
        try:
            (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            task = tasks.decode(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        for sample, completion in zip(task.samples, task.completions, strict=True):
            each = asyncio.create_task(answer(task, sample, completion))
            under_way.add(each)
            each.add_done_callback(under_way.discard)


def judge(reward: Reward, task: Task, completion: str) -> Verdict:
    """The reward's verdict; one with an `error` where it raises or gives no finite number."""
    try:
        return checked(reward(task.prompt, completion, task.answer, **task.fields))
    except Exception as error:  # a reward is other people's code
        return Verdict.failed(f"{type(error).__name__}: {error}")


async def ask(reward: Reward, task: Task, completion: str, wait_s: float) -> Verdict:
    """The same of a reward that waits, `wait_s` at most."""
    try:
        async with asyncio.timeout(wait_s):
            value = reward(task.prompt, completion, task.answer, **task.fields)
            return checked(await value if inspect.isawaitable(value) else value)
    except TimeoutError:
        return Verdict.failed(f"no verdict within {wait_s:g} s")
    except Exception as error:
        return Verdict.failed(f"{type(error).__name__}: {error}")


def checked(value: float | bool | Verdict) -> Verdict:
    verdict = msgspec.convert(msgspec.to_builtins(Verdict.of(value)), Verdict)  # a struct does not check its own fields
    return verdict if math.isfinite(verdict.score) else Verdict.failed(f"the score is {verdict.score}")


def main() -> None:
    control, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the pool closes us
    setup = msgspec.msgpack.decode(control.recv(MAX_MESSAGE), type=Setup)
    rewards = {domain: resolve(name, options) for domain, (name, options) in setup.rewards.items()}
    nursery = Nursery(control, rewards, setup)
    control.send(msgspec.msgpack.encode(Loaded([domain for domain, reward in rewards.items() if waits(reward)])))
    die_with(0)  # from here on the end of the socket says that the parent died, and the workers' children die too
    gc.freeze()
    nursery.run()


if __name__ == "__main__":
    main()

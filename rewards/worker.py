"""A process that judges: `python -m rewards.worker FD PARENT`, started by the scorer, over a socket.

It reads the table of rewards, answers with an empty message when they are loaded, and then reads one task after
another and answers each of its completions as soon as that is judged. So the scorer always knows which completion a
hanging or dying worker was at.
"""

import ctypes
import math
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from rewards.table import Reward, resolve
from rewards.verdict import Verdict

PR_SET_PDEATHSIG = 1

RewardTable = dict[str, tuple[str, dict[str, Any]]]  # domain -> name and options of its reward


class Task(msgspec.Struct, array_like=True):
    """Completions of one prompt."""

    domain: str
    prompt: str
    answer: str
    fields: dict[str, Any]
    completions: list[str]


def serve(connection: Connection) -> None:
    """Judges until the other side closes. Raises `ValueError` for a reward that cannot be resolved."""
    table = msgspec.msgpack.decode(connection.recv_bytes(), type=RewardTable)
    rewards = {domain: resolve(name, options) for domain, (name, options) in table.items()}
    connection.send_bytes(b"")
    decoder, encoder = msgspec.msgpack.Decoder(Task), msgspec.msgpack.Encoder()
    while True:
        try:
            task = decoder.decode(connection.recv_bytes())
        except EOFError:
            return
        for completion in task.completions:
            verdict = judge(rewards[task.domain], task, completion)
            connection.send_bytes(encoder.encode(verdict))


def judge(reward: Reward, task: Task, completion: str) -> Verdict:
    """The reward's verdict; one with an `error` where it raises or gives no finite number."""
    try:
        verdict = Verdict.of(reward(task.prompt, completion, task.answer, **task.fields))
        verdict = msgspec.convert(msgspec.to_builtins(verdict), Verdict)  # a struct does not check its own fields
    except Exception as error:  # a reward is other people's code
        return Verdict.failed(f"{type(error).__name__}: {error}")
    return verdict if math.isfinite(verdict.score) else Verdict.failed(f"the score is {verdict.score}")


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the scorer closes us
    serve(Connection(descriptor))


if __name__ == "__main__":
    main()

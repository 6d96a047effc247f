"""What the learner ranks hear of the coordinator, and when: a thread plays the coordinator."""

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from engine.config import Deadlines
from engine.rollouts import Hopeless, Rollouts
from engine.schema import Evaluated, Evaluation, FromLearner, Refused, Score, Stalled, ToLearner
from engine.stream import Link, Silence

COLLECTIVE_S = 2.0
ANSWER = Evaluated(Evaluation("late", 3, 3, 1.0, {"all": Score(0.5, 0.1, 0.5, 4, 8, 0, 7.0)}))


class Never:
    """A process that lives, a stop that nobody asks for."""

    asked, num_dumps = False, 0

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()

    def dump_stacks(self) -> None:
        self.num_dumps += 1


def rollouts(rank: int, num_learners: int) -> Rollouts:
    """Without the process that it would start."""
    made: Any = object.__new__(Rollouts)
    made._deadlines = Deadlines(collective_s=COLLECTIVE_S, evaluate_s=30.0)
    made._seat = SimpleNamespace(rank=rank, num_learners=num_learners)
    made._stop, made._child, made.generators, made.say = Never(), Never(), [], print
    if rank == 0:
        made._link = Link(ToLearner)
    return made


def coordinator(address: str, messages: list[tuple[float, Any]]) -> Link:
    """Says each of `messages` after so many seconds."""
    link = Link(FromLearner, connect=address)
    link.send(ANSWER)

    def play() -> None:
        for wait_s, message in messages:
            time.sleep(wait_s)
            link.send(message)

    threading.Thread(target=play, daemon=True).start()
    return link


def hear(mine: Rollouts) -> None:
    """Waits for the coordinator's first word."""
    assert mine._link.receive(10.0, "connection") == ANSWER


def _on_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    limit = timedelta(seconds=COLLECTIVE_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    mine = rollouts(rank, 2)
    if rank == 0:
        link = coordinator(mine._link.address, [(3 * COLLECTIVE_S, ANSWER)])
        hear(mine)
    heard = mine.evaluation("late")
    if rank == 0:
        link.close()
    Path(folder, str(rank)).write_text(repr(heard))
    dist.barrier()
    dist.destroy_process_group()


def test_a_wait_longer_than_a_collective_may_take_ends_no_rank(tmp_path: Path) -> None:
    start_processes(_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    assert [Path(tmp_path, str(rank)).read_text() for rank in range(2)] == [repr(ANSWER.evaluation)] * 2


def test_silence_says_why_no_generator_samples(capsys: pytest.CaptureFixture[str]) -> None:
    mine = rollouts(0, 1)
    mine._deadlines = Deadlines(evaluate_s=0.5)
    link = coordinator(mine._link.address, [(0.0, Stalled("no generator is a member of the job"))])
    hear(mine)
    with pytest.raises(Silence, match="'before': the coordinator gave no answer for 0.5 s; no generator is a member"):
        mine.evaluation("before")
    link.close()
    child: Any = mine._child
    assert child.num_dumps == 1
    assert "evaluation 'before' waits: no generator is a member of the job" in capsys.readouterr().out


def test_what_the_coordinator_refuses_while_the_job_runs_is_no_mistake_of_the_configuration() -> None:
    mine = rollouts(0, 1)
    link = coordinator(mine._link.address, [(0.0, Refused("100 groups in a row failed"))])
    hear(mine)
    with pytest.raises(Hopeless, match="^take at version 7: 100 groups in a row failed$"):
        mine.take(4, 7)
    link.close()

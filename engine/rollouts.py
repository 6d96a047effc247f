"""The learners' side of the coordinator: rank 0 talks to it, the other learner ranks hear what it hears."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Config, ConfigError
from engine.placement import Seat, advertised
from engine.process import Child, Stopped, StopSignal, Supervisor
from engine.run_directory import RunDirectory
from engine.schema import (
    Done,
    Evaluate,
    Evaluated,
    Evaluation,
    Finished,
    Group,
    Probed,
    Published,
    Ready,
    Refused,
    Save,
    Stalled,
    State,
    Take,
    Taken,
    ToLearner,
    Trained,
)
from engine.stream import Link, Silence
from engine.wire import decode, encode


class Hopeless(RuntimeError):
    """What was asked for will not come, though all processes live."""


class Rollouts:
    """Starts the coordinator, and asks it. Every method is called by all learner ranks alike; only rank 0's link is
    real. All waits end with an error that names the phase when the coordinator dies or stays silent."""

    def __init__(self, config: Config, run: RunDirectory, seat: Seat, stop: StopSignal, segment: str, snapshot: str):
        """`segment` names the weights' shared memory; `snapshot` is the checkpoint to continue from, or empty."""
        self._deadlines, self._seat, self._stop = config.deadlines, seat, stop
        self.address, self.incarnation = "", 0
        self.say: Callable[[str], None] = lambda text: None
        self.generators: list[Supervisor] = []  # of this rank: without them no answer would come
        if seat.rank == 0:
            self._link = Link(ToLearner)
            self._child = Child(
                "coordinator",
                "engine.coordinator_loop",
                ["--run", str(run.path), "--learner", self._link.address, "--segment", segment]
                + (["--resume", snapshot] if snapshot else []),
                run.logs / "coordinator.log",
            )
            start_s = self._deadlines.start_s
            if seat.num_learners > 1:
                start_s = min(start_s, self._deadlines.collective_s / 2)  # the other ranks go on
            ready = self._receive(start_s, "start of the coordinator", Ready)
            self.address, self.incarnation = advertised(ready.address), ready.incarnation

    def take(self, num_groups: int, version: int) -> Taken | None:
        """The next groups to train at `version`, the same on every rank; None when the job is asked to stop."""
        message = Take(num_groups, version)
        return self._ask(message, Taken, self._deadlines.take_s, f"take at version {version}")

    def trained(self, message: Trained) -> None:
        self._tell(message)

    def published(self, version: int, digest: str) -> None:
        self._tell(Published(version, digest))

    def evaluate(self, name: str) -> None:
        """Starts an evaluation whose result comes in a later `State`."""
        self._tell(Evaluate(name))

    def evaluation(self, name: str) -> Evaluation | None:
        """An evaluation awaited, on every rank; no new version is published meanwhile, so it measures one version. None
        when the job is asked to stop."""
        message = Evaluate(name, wait=True)
        answer = self._ask(message, Evaluated, self._deadlines.evaluate_s, f"evaluation {name!r}")
        return None if answer is None else answer.evaluation

    def probe(self) -> list[Group]:
        """A few fresh groups at the newest version, on every rank; empty when the job is asked to stop."""
        message = Evaluate("probe", kind="probe", wait=True)
        answer = self._ask(message, Probed, self._deadlines.evaluate_s, "parity probe")
        return [] if answer is None else answer.groups

    def save(self, path: str, step: int) -> State:
        """Has the coordinator write its part of a checkpoint below `path`; rank 0 alone."""
        self._tell(Save(path, step))
        phase = f"checkpoint at step {step}"
        return self._receive(self._deadlines.collective_s, phase, Done, interruptible=False).state

    def finish(self, reason: str) -> State | None:
        """Ends generators and coordinator in order; the last state, on rank 0."""
        if self._seat.rank != 0:
            return None
        self._tell(Finished(reason))
        done = self._receive(self._deadlines.stop_s, "end of the coordinator", Done, interruptible=False)
        self._child.wait(self._deadlines.stop_s)
        return done.state

    def close(self) -> None:
        if self._seat.rank == 0:
            self._child.stop(1.0)
            self._link.close()

    def _tell(self, message: Any) -> None:
        if self._seat.rank != 0:
            return
        try:
            self._link.send(message)
        except Silence as error:
            raise self._child.error() from error

    def _ask(self, message: Any, expected: type, timeout_s: float, phase: str) -> Any:
        """The answer to rank 0's message, on every learner rank; None when the job is asked to stop."""
        alone = self._seat.num_learners == 1
        if self._seat.rank != 0:
            while (heard := broadcast_frames([])) is None:
                pass
            return decode(heard, ToLearner) if heard else None
        answer = None
        if not self._stop.asked:
            self._tell(message)
            try:
                answer = self._receive(timeout_s, phase, expected, tell_ranks=not alone)
            except Stopped:
                answer = None
        if not alone:
            broadcast_frames([] if answer is None else [bytes(frame) for frame in encode(answer)])
        return answer

    def _receive(
        self, timeout_s: float, phase: str, expected: type, interruptible: bool = True, tell_ranks: bool = False
    ) -> Any:
        """With `tell_ranks` the other ranks wait in a collective, and hear so often that it goes on that none of theirs
        meets its deadline."""
        watch = [self._child, self._stop, *self.generators] if interruptible else [self._child]
        deadline, reason = time.monotonic() + timeout_s, ""
        while True:
            left = max(0.0, deadline - time.monotonic())
            patience = min(left, self._deadlines.collective_s / 3) if tell_ranks else left
            try:
                message = self._link.receive(patience, phase, watch)
            except Silence:
                if patience < left:
                    broadcast_frames(None)
                    continue
                self._child.dump_stacks()
                raise Silence(f"{phase}: the coordinator gave no answer for {timeout_s:g} s{reason}") from None
            if isinstance(message, Stalled):
                self.say(f"{phase} waits: {message.reason}")
                reason = f"; {message.reason}"
            elif isinstance(message, expected | Refused):
                break
            else:  # it answers a request that a stop ended
                assert isinstance(message, Taken | Probed | Evaluated), f"{phase}: got {type(message).__name__}"
        if isinstance(message, Refused):
            raise (ConfigError if expected is Ready else Hopeless)(f"{phase}: {message.reason}")
        return message


def broadcast_frames(frames: list[bytes] | None) -> list[bytes] | None:
    """Rank 0's byte strings on every rank of the default group: the number, the lengths, then all bytes at once. None
    says that they are still to come."""
    count = torch.tensor([-1 if frames is None else len(frames)])
    dist.broadcast(count, 0)
    if int(count) <= 0:
        return None if int(count) < 0 else []
    lengths = torch.tensor([len(frame) for frame in frames or []] or [0] * int(count), dtype=torch.int64)
    dist.broadcast(lengths, 0)
    total = int(lengths.sum())
    joined = torch.from_numpy(np.frombuffer(b"".join(frames or []) or bytes(total), dtype=np.uint8).copy())
    dist.broadcast(joined, 0)
    ends = torch.cumsum(lengths, 0).tolist()
    data = joined.numpy().tobytes()
    return [data[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]

"""The learners' side of the coordinator: rank 0 talks to it, the other learner ranks hear what it hears."""

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
    State,
    Take,
    Taken,
    ToLearner,
    Trained,
    decode,
    encode,
)
from engine.stream import Link, Silence


class Rollouts:
    """Starts the coordinator, and asks it. Every method is called by all learner ranks alike; only rank 0's link is
    real. All waits end with an error that names the phase when the coordinator dies or stays silent."""

    def __init__(self, config: Config, run: RunDirectory, seat: Seat, stop: StopSignal, segment: str, snapshot: str):
        """`segment` names the weights' shared memory; `snapshot` is the checkpoint to continue from, or empty."""
        self._deadlines, self._seat, self._stop = config.deadlines, seat, stop
        self.address, self.incarnation = "", 0
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
            ready = self._receive(self._deadlines.start_s, "start of the coordinator", Ready)
            self.address, self.incarnation = advertised(ready.address), ready.incarnation

    def take(self, num_groups: int, version: int) -> Taken | None:
        """The next groups to train at `version`, the same on every rank; None when the job is asked to stop."""
        taken = None
        if self._seat.rank == 0 and not self._stop.asked:
            try:
                message = Take(num_groups, version)
                taken = self._ask(message, Taken, self._deadlines.take_s, f"take at version {version}")
            except Stopped:
                taken = None
        return self._share(taken)

    def trained(self, message: Trained) -> None:
        self._tell(message)

    def published(self, version: int, digest: str) -> None:
        self._tell(Published(version, digest))

    def evaluate(self, name: str) -> None:
        """Starts an evaluation whose result comes in a later `State`."""
        self._tell(Evaluate(name))

    def evaluation(self, name: str) -> Evaluation | None:
        """An evaluation awaited; no new version is published meanwhile, so it measures one version. Rank 0 only has
        it."""
        if self._seat.rank != 0:
            return None
        message = Evaluate(name, wait=True)
        return self._ask(message, Evaluated, self._deadlines.evaluate_s, f"evaluation {name!r}").evaluation

    def probe(self) -> list[Group]:
        """A few fresh groups at the newest version, on every rank; empty when the job is asked to stop."""
        probed = None
        if self._seat.rank == 0:
            message = Evaluate("probe", kind="probe", wait=True)
            try:
                probed = self._ask(message, Probed, self._deadlines.evaluate_s, "parity probe")
            except Stopped:
                probed = None
        shared = self._share(probed)
        return [] if shared is None else shared.groups

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
        self._tell(message)
        return self._receive(timeout_s, phase, expected)

    def _receive(self, timeout_s: float, phase: str, expected: type, interruptible: bool = True) -> Any:
        watch = [self._child, self._stop, *self.generators] if interruptible else [self._child]
        while True:
            message = self._link.receive(timeout_s, f"{phase}: waiting for the coordinator", watch)
            late = isinstance(message, Taken | Probed | Evaluated) and not isinstance(message, expected)
            if not late:  # else it answers a request that a stop ended
                break
        if isinstance(message, Refused):
            raise ConfigError(f"{phase}: {message.reason}")
        assert isinstance(message, expected), f"{phase}: got {type(message).__name__}"
        return message

    def _share(self, message: Any) -> Any:
        """Rank 0's message on every learner rank."""
        if self._seat.num_learners == 1:
            return message
        frames = [] if message is None else [bytes(frame) for frame in encode(message)]
        heard = broadcast_frames(frames)
        return message if self._seat.rank == 0 else decode(heard, ToLearner) if heard else None


def broadcast_frames(frames: list[bytes]) -> list[bytes]:
    """Rank 0's byte strings on every rank of the default group: the number, the lengths, then all bytes at once."""
    count = torch.tensor([len(frames)])
    dist.broadcast(count, 0)
    lengths = torch.tensor([len(frame) for frame in frames] or [0] * int(count), dtype=torch.int64)
    if not int(count):
        return []
    dist.broadcast(lengths, 0)
    total = int(lengths.sum())
    joined = torch.from_numpy(np.frombuffer(b"".join(frames) or bytes(total), dtype=np.uint8).copy())
    dist.broadcast(joined, 0)
    ends = torch.cumsum(lengths, 0).tolist()
    data = joined.numpy().tobytes()
    return [data[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]

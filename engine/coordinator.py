"""The state machine between prompts, generators and learner: who holds which group, and what became of it.

Pure and single-threaded: no socket, no clock. Every method takes `now` (monotonic seconds) and commits the ledger
before it returns, so its answer may be sent at once.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from engine.config import Config
from engine.ledger import Ledger
from engine.schema import Ack, Evaluation, Failure, Group, Heartbeat, Kind, Lease, Prompt, State, Taken, Trained

Shape = Callable[[Group], np.ndarray]  # group -> penalised scores, float64 [num_samples]


class Prompts(Protocol):
    """What the coordinator needs of the prompt cursor."""

    def draw(self) -> tuple[str, int]: ...
    def prompt(self, domain: str, index: int) -> Prompt: ...
    def held_out(self) -> list[Prompt]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Coordinator:
    incarnation: int
    version: int  # the learner's: that of the newest `Trained`, or the checkpoint's

    def __init__(self, config: Config, prompts: Prompts, ledger: Ledger, shape: Shape) -> None: ...

    def begin(self, now: float, snapshot: bytes | None = None) -> int:
        """Opens a new incarnation on `snapshot` (None: from nothing) and returns its number. Call it first, once."""
        ...

    def snapshot(self, step: int) -> bytes:
        """Cursor, frontier and buffered groups: all that `begin` needs. The ledger is on disk when this returns."""
        ...

    # ---- generators
    def has(self, generator: str) -> bool:
        """Whether the generator is a member; answer a message of one that is not with `Stop`: it joins again."""
        ...

    def join(self, generator: str, now: float) -> None:
        """A generator joins (or joins again: what it held goes back). It is routed once it applied a version."""
        ...

    def leave(self, generator: str, reason: str, now: float) -> None:
        """A generator left or died; what it held goes to others."""
        ...

    def request(self, generator: str, num_groups: int, now: float) -> None: ...
    def applied(self, generator: str, incarnation: int, version: int, now: float) -> None: ...
    def heartbeat(self, generator: str, beat: Heartbeat, now: float) -> None: ...
    def arrived(self, group: Group, now: float) -> Ack:
        """Ack with an empty `reason`: the group is accepted (also where it is then filtered or failed)."""
        ...

    def failure(self, generator: str, failure: Failure, now: float) -> Ack: ...
    def grants(self, now: float) -> dict[str, list[Lease]]:
        """The leases to send now, by generator. Call it after any batch of other calls; usually empty."""
        ...

    # ---- learner
    def take(self, num_groups: int, version: int, now: float) -> Taken | None:
        """The groups to train at `version`; None: the learner must wait, ask again after the next change."""
        ...

    def trained(self, trained: Trained, now: float) -> None: ...
    def published(self, version: int, now: float) -> None: ...
    def evaluate(self, name: str, kind: Kind, wait: bool, now: float) -> None:
        """Begins an evaluation or a probe. While one with `wait` is open nothing else is leased, and its leases go
        only to generators at the published version."""
        ...

    def evaluation(self, name: str) -> Evaluation | None:
        """The finished evaluation begun with `wait`, once; None while it goes on."""
        ...

    def probe(self, name: str) -> list[Group] | None:
        """The finished probe, once; None while it goes on."""
        ...

    def state(self, now: float) -> State:
        """Hands out each evaluation finished without `wait` once."""
        ...

    # ---- time
    def tick(self, now: float) -> list[str]:
        """Takes back what is overdue. Returns a line for every generator dropped or no longer routed."""
        ...

    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the earliest."""
        ...

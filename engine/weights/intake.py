"""How a generator takes new versions: staged by a thread while it samples, applied between two tokens."""

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from engine.schema import Applied
from engine.weights.manifest import WeightsError
from engine.weights.subscribe import Staged, Subscriber

STAGE_AGAIN_S = 1.0


class Loads(Protocol):
    """What takes versions; a `Generator` does."""

    version: int

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None: ...


class Intake:
    """Brings `generator` to the newest version wanted. What cannot be staged is tried again later, on the old version
    until then; what `load` raises is the generator's end, which its supervisor answers with a new one."""

    def __init__(self, subscriber: Subscriber, generator: Loads, incarnation: int, staged: Callable[[], object]):
        """`staged` is called by another thread when `advance` has something to apply."""
        self._subscriber, self._generator, self._incarnation, self._tell = subscriber, generator, incarnation, staged
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="stager")
        self._staging: Future[tuple[Staged, float]] | None = None
        self.applied: Applied | None = None  # what was said of the newest version
        self._wanted = -1
        self._peak = 0.0  # bytes a second, the most seen
        self._stage_from = 0.0  # when to try again after a staging that failed

    def want(self, version: int) -> None:
        """`version` lies ready; it supersedes one not yet staged."""
        self._wanted = max(self._wanted, version)

    def advance(self) -> Applied | None:
        """Starts staging what is wanted and applies what lies staged; of the latter, what to say. To be called between
        two decode steps."""
        late = self._wanted > self._generator.version and time.monotonic() >= self._stage_from
        if self._staging is None and late:
            self._staging = self._stager.submit(self._stage, self._wanted)
            self._staging.add_done_callback(lambda _: self._tell())
        if self._staging is None or not self._staging.done():
            return None
        staging, self._staging = self._staging, None
        if isinstance(error := staging.exception(), WeightsError):
            self._stage_from = time.monotonic() + STAGE_AGAIN_S
            print(f"leeway: {error}", file=sys.stderr, flush=True)
            return None
        return self._apply(*staging.result())

    def _stage(self, version: int) -> tuple[Staged, float]:
        started = time.monotonic()
        return self._subscriber.stage(self._incarnation, version), time.monotonic() - started

    def _apply(self, staged: Staged, stage_s: float) -> Applied:
        if staged.incarnation != self._incarnation:
            raise WeightsError(f"staged incarnation {staged.incarnation}, this generator is of {self._incarnation}")
        paused = time.monotonic()
        self._generator.load(staged.version, staged.tensors)
        pause_s = time.monotonic() - paused
        rate = staged.num_bytes / stage_s
        self._peak = max(self._peak, rate)
        self.applied = Applied(
            staged.incarnation, staged.version, stage_s, pause_s, staged.num_bytes, rate / self._peak
        )
        return self.applied

    def close(self) -> None:
        self._stager.shutdown(wait=True, cancel_futures=True)
        self._subscriber.close()

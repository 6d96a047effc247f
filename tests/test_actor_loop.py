"""The generator's loop without its process, turned by hand, between a coordinator made of a socket and an engine that
finishes what it is told to."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import SMALL

from engine import tokenizer
from engine.actor_loop import Actor
from engine.config import Config, load, to_toml
from engine.generators.base import Sampled
from engine.generators.table import GENERATORS
from engine.schema import (
    SCHEMA_VERSION,
    Cancel,
    FromGenerator,
    Heartbeat,
    Hello,
    Lease,
    LeaseKey,
    Leases,
    Prompt,
    Request,
    Result,
    Sampling,
    ToGenerator,
    Welcome,
)
from engine.stream import Hub, Link
from engine.weights import Manifest, Publisher, host_id

PATIENCE_S = 60.0
JUDGED_S = 60.0  # by a reward that hangs
SLOTS = 8


class Patient:
    """An engine that samples for ever, but for the leases in `ready`; of those it forgets none, as may an engine that
    had just finished them."""

    manifest = None
    version = -1
    generated_tokens = 0

    def __init__(self) -> None:
        self.held: dict[LeaseKey, Lease] = {}
        self.ready: list[Lease] = []

    def submit(self, lease: Lease) -> None:
        self.held[lease.key] = lease

    def poll(self, timeout_s: float) -> list[Sampled]:
        finished, self.ready = self.ready, []
        for lease in finished:
            self.held.pop(lease.key, None)
        return [sampled(lease) for lease in finished]

    def fileno(self) -> int:
        return -1

    def memory(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def load(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        self.version = version

    def cancel(self, key: LeaseKey) -> None:
        self.held.pop(key, None)

    @property
    def num_running(self) -> int:
        return sum(lease.num_samples for lease in self.held.values())

    @property
    def num_free_slots(self) -> int:
        return SLOTS - self.num_running

    def close(self) -> None:
        pass


def sampled(lease: Lease) -> Sampled:
    num = lease.num_samples
    whole, real = np.zeros(num, np.int32), np.zeros(num, np.float32)
    return Sampled(lease, [1] * num, ["stop"] * num, whole, real, whole, kv_mixed=False)


class Between:
    """An actor and what it says."""

    def __init__(self, config: Config, segment: str, engine: Patient):
        self.hub = Hub("127.0.0.1", 0, FromGenerator)
        self.engine = engine
        link = Link(ToGenerator, connect=f"tcp://127.0.0.1:{self.hub.port}", identity="g")
        link.send(Hello(SCHEMA_VERSION, "g", "here", 1))
        self.heard: list[Any] = []
        welcome = Welcome(
            schema_version=SCHEMA_VERSION,
            incarnation=0,
            config=to_toml(config),
            files=tokenizer.files(tokenizer.load(config.model)),
            segment=segment,
            host=host_id(),
            weights_port=1,
        )
        self.actor, self._link = Actor(config, welcome, link, "g", None), link
        self.until(lambda: self.said(Hello))

    def tell(self, *messages: Any) -> None:
        for message in messages:
            self.hub.send("g", message)

    def until(self, condition: Callable[[], object]) -> None:
        """Turns the loop until `condition` holds."""
        limit = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < limit
            self.actor._turn()
            self.heard += [message for _, message, _ in self.hub.drain()]
            time.sleep(0.001)

    def said(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def forget(self) -> None:
        """What it says from now on is asked for."""
        self.heard = []

    def close(self) -> None:
        self.actor.close()
        self._link.close()
        self.hub.close()


@pytest.fixture
def between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    deadlines = {"heartbeat_s": 0.05, "reward_s": 2 * JUDGED_S, "lease_s": PATIENCE_S}
    settings = [f"--deadlines.{name}={value}" for name, value in deadlines.items()]
    config = load(SMALL, [*settings, "--generator.reward_workers=1"])
    segment, engine = f"actor-{os.getpid()}", Patient()
    monkeypatch.setitem(GENERATORS, config.generator.engine, lambda *_: engine)
    with (
        closing(Publisher(segment, Manifest.lay_out([("w", (4,), torch.float32)]))),
        closing(Between(config, segment, engine)) as made,
    ):
        yield made


def lease(group_id: int, attempt: int = 1, **fields: float) -> Lease:
    prompt = Prompt("digits", group_id, np.array([2], np.int32), "?", "", fields)
    return Lease("train", group_id, attempt, 0, 7, 2, prompt, Sampling(1.0, 4))


def granted(between: Between, *leases: Lease) -> None:
    """The actor holds them."""
    between.tell(Leases(0, list(leases)))
    between.until(lambda: all(lease.key in between.actor._held for lease in leases))


def cancelled(between: Between, *leases: Lease) -> None:
    """The actor says that it holds none of them, though it is told so twice."""
    between.tell(*[Cancel([lease.key for lease in leases])] * 2)
    between.until(lambda: not any(lease.key in between.actor._held for lease in leases))
    between.forget()
    between.until(lambda: between.said(Heartbeat))
    assert not {lease.key for lease in leases} & set(between.said(Heartbeat)[0].held)


def test_a_cancelled_lease_leaves_its_place_to_others(between: Between) -> None:
    """Of two attempts at one group only the one that is over."""
    old, new = lease(0), lease(0, attempt=2)
    granted(between, old, new)
    cancelled(between, old, lease(5))
    assert list(between.engine.held) == [new.key]
    assert between.said(Heartbeat)[0].held == [new.key]
    between.forget()
    between.until(lambda: between.said(Request))
    ahead = between.actor._config.generator.ahead_groups * between.actor._config.run.group_size
    assert between.said(Request)[0].num_samples == SLOTS - new.num_samples + ahead
    between.engine.ready = [new]
    between.until(lambda: between.said(Result))
    assert between.said(Result)[0].group.attempt == 2


def test_what_was_cancelled_when_it_was_as_good_as_done_is_not_judged(between: Between) -> None:
    over, other = lease(0), lease(1)
    granted(between, over, other)
    cancelled(between, over)
    between.engine.ready = [over, other]
    between.until(lambda: between.said(Result))
    assert [result.group.group_id for result in between.said(Result)] == [1] and not between.actor._scoring


def test_a_cancelled_lease_frees_the_worker_that_judges_it(between: Between) -> None:
    hangs, other = lease(0, delay_s=JUDGED_S), lease(1)
    granted(between, hangs, other)
    between.engine.ready = [hangs]
    between.until(lambda: hangs.key in between.actor._scoring)
    cancelled(between, hangs)
    between.engine.ready = [other]
    started = time.monotonic()
    between.until(lambda: between.said(Result))
    assert between.said(Result)[0].group.group_id == 1 and time.monotonic() - started < JUDGED_S / 2


def test_a_result_that_is_not_wanted_is_not_said_again(between: Between) -> None:
    done = lease(0)
    granted(between, done)
    between.engine.ready = [done]
    between.until(lambda: between.said(Result))
    assert done.key in between.actor._unacknowledged
    between.tell(Cancel([done.key]))
    between.until(lambda: not between.actor._unacknowledged)
    between.forget()
    between.until(lambda: between.said(Heartbeat))
    assert between.said(Heartbeat)[0].held == []

"""The coordinator's process without the process: its loop between a learner and a generator made of two sockets."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fake_run
import pytest
import torch
from jobs import SMALL

from engine import tokenizer
from engine.config import Config, load
from engine.coordinator_loop import CoordinatorLoop
from engine.run_directory import create
from engine.schema import (
    SCHEMA_VERSION,
    Applied,
    Cancel,
    Done,
    Evaluate,
    Finished,
    Heartbeat,
    Hello,
    Lease,
    Leases,
    Published,
    Ready,
    Refused,
    Request,
    Result,
    Save,
    Saved,
    Stop,
    Take,
    ToGenerator,
    ToLearner,
)
from engine.snapshot import SNAPSHOT, unpack
from engine.stream import Link, read_tap
from engine.weights import Manifest, Publisher

PATIENCE_S = 10.0


class Between:
    """A loop in this process, turned by hand, and what it hears and says."""

    def __init__(self, config: Config, segment: str):
        def write_model(folder: Path) -> None:
            for name, content in tokenizer.files(tokenizer.load(config.model)).items():
                (folder / name).write_bytes(content)

        self.run = create(config, write_model)
        self.learner = Link(ToLearner)
        self.loop = CoordinatorLoop(config, self.run, self.learner.address, segment, None)
        self.generator = Link(ToGenerator, connect=f"tcp://127.0.0.1:{self.loop._hub.port}", identity="g")
        self.coordinator = self.loop._coordinator

    def join(self, num_samples: int) -> None:
        """A generator joins, applies version 0 and asks; nothing is granted yet."""
        self.loop._link.send(Ready("", 0))  # the connection stands once this arrives
        assert isinstance(self.learner.receive(PATIENCE_S, "ready"), Ready)
        self.learner.send(Published(0, ""))
        self.hear(lambda: self.coordinator.roster.published == 0)
        for message in (Hello(SCHEMA_VERSION, "g", "here", 1), Applied(0, 0, 1.0, 0.0), Request(num_samples)):
            self.generator.send(message)
        self.hear(lambda: "g" in self.coordinator.members() and self.coordinator.roster.members["g"].num_wanted)

    def hear(self, condition) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < limit
            self.loop._pump.wait(limit)

    def grant(self) -> list[Lease]:
        return [lease for leases in self.coordinator.grants(time.monotonic()).values() for lease in leases]

    def close(self) -> None:
        for end in (self.loop, self.learner, self.generator):
            end.close()


@pytest.fixture
def between(tmp_path: Path) -> Iterator[Between]:
    config = load(SMALL, [f"--run.directory={tmp_path / 'run'}", "--placement.trusted=true"])
    segment = f"loop-{os.getpid()}"
    with (
        closing(Publisher(segment, Manifest.lay_out([("w", (4,), torch.float32)]))),
        closing(Between(config, segment)) as made,
    ):
        yield made


def test_nothing_is_drawn_once_the_learner_has_the_last_counts(between: Between) -> None:
    between.join(99)
    between.learner.send(Finished("the job is done"))
    between.loop.run()
    heard = [between.learner.receive(PATIENCE_S, "end") for _ in range(2)]
    assert [type(message) for message in heard] == [Ready, Done]
    assert heard[1].state.ends["drawn"] == between.loop._ledger.counts()["drawn"] == 0
    between.loop._hub.send("g", Stop("a mark"))
    said = [type(between.generator.receive(PATIENCE_S, "stop")) for _ in range(4)]
    assert Leases not in said


def test_an_evaluation_handed_out_at_a_checkpoint_is_not_kept_in_it(between: Between, tmp_path: Path) -> None:
    """Else a resume would hand it out, and the learner record it, once more."""
    between.join(99)
    between.learner.send(Evaluate("step 0"))
    between.hear(between.coordinator.surveys.under_way)
    leases = [lease for lease in between.grant() if lease.kind == "eval"]
    for lease in leases:
        between.generator.send(Result(fake_run.result(lease)))
    between.hear(lambda: not between.coordinator.surveys.under_way())
    between.learner.send(Save(str(tmp_path), 0))
    between.hear((tmp_path / SNAPSHOT).exists)
    done = between.learner.receive(PATIENCE_S, "saved")
    assert [evaluation.name for evaluation in done.state.completed_evaluations] == ["step 0"]
    assert unpack((tmp_path / SNAPSHOT).read_bytes()).evaluations == []


def test_a_take_that_no_group_will_come_for_is_refused(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.coordinator.HOPELESS", 1)
    between.join(99)
    between.learner.send(Take(4, 0))
    between.hear(lambda: between.loop._open)
    leases, take = between.grant(), between.loop._open
    assert take is not None and between.loop._try(take, 0.0) is None
    for lease in leases:
        between.generator.send(Result(fake_run.result(lease, errors=lease.num_samples)))
    between.hear(lambda: between.coordinator.hopeless)
    between.loop._answer(0.0)
    refused = between.learner.receive(PATIENCE_S, "take")
    assert refused == Refused(f"{len(leases)} groups in a row failed; the first: 0 valid completions of 4: died")


def test_the_record_of_a_checkpoint_is_on_disk_before_the_learner_hears_of_it(
    between: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [tap] = between.run.stream.glob("*.tap")
    synced, send, sync = [], between.loop._link.send, os.fsync

    def note(descriptor: int) -> None:
        sync(descriptor)
        if os.path.samestat(os.fstat(descriptor), tap.stat()):
            synced.append(list(read_tap(tap))[-1])

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(between.loop._link, "send", lambda message: synced.append(message) or send(message))
    between.join(1)
    between.learner.send(Save(str(tmp_path), 3))
    between.hear(lambda: len(synced) >= 3)
    assert [type(each) for each in synced] == [Ready, Saved, Done]


def test_a_generator_hears_what_it_holds_for_nothing(between: Between) -> None:
    between.join(99)
    held, *rest = [lease.key for lease in between.grant()]
    over = (held[0], held[1], held[2] - 1)
    member = between.coordinator.roster.members["g"]
    for _ in range(2):  # as often as it says that it holds it
        before = member.beat_s
        between.generator.send(Heartbeat([held, over, *rest], 0, 0.0, 0.0))
        between.hear(lambda: member.beat_s > before)  # noqa: B023  (called at once)
        heard = [between.generator.receive(PATIENCE_S, "cancel")]
        while not isinstance(heard[-1], Cancel):
            heard.append(between.generator.receive(PATIENCE_S, "cancel"))
        assert heard[-1] == Cancel([over])

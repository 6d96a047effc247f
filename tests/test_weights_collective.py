"""Versions by broadcast: generators are killed, stopped, late and lied to, and all others go on."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Event
from threading import enumerate as enumerate_threads
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import SMALL

from engine.config import ConfigError, load
from engine.weights import Manifest, Publisher, Server, WeightsError, collective, group, subscribe
from engine.weights.collective import Broadcaster
from engine.weights.group import Gloo
from engine.weights.segment import Header
from engine.weights.tcp import Call, Enter

SHAPES = [(512, 512), (3,), (1024, 512), (256, 1000)]  # 4 MiB
MANIFEST = Manifest.lay_out([(f"layer{i}", shape, torch.float32) for i, shape in enumerate(SHAPES)])
NAME = f"collective-{os.getpid()}"
PIECE_BYTES = 1 << 16  # 64 pieces
PATIENCE_S = 60.0
MIDDLE = 20  # pieces
GATHER_S = 3.0  # long, so that on a busy machine none is late; it is waited for where one is gone

_server = multiprocessing.get_context("forkserver")  # processes without this one's threads


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(version)
    return [(entry.name, torch.randn(entry.shape)) for entry in MANIFEST.entries]


# ---- what happens in the middle of a broadcast, to a generator ----


def send_self(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def fault(piece: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), number)
        return piece

    return fault


def damage(piece: torch.Tensor) -> torch.Tensor:
    piece[1000] ^= 4
    return piece


FAULTS = {"killed": send_self(signal.SIGKILL), "stopped": send_self(signal.SIGSTOP), "damaged": damage}


def generate(pipe: Connection, name: str, address: str, step_s: float, timeout_s: float) -> None:
    """Stages what the pipe says: (version, fault in its middle), answers (digest, broadcasts received)."""
    torch.set_num_threads(1)
    Gloo.piece_bytes = PIECE_BYTES
    landed, fault, count = Gloo.landed, "", 0

    def faulty(self: Gloo, slot: int, num_bytes: int) -> torch.Tensor:
        nonlocal count
        count += 1
        piece = landed(self, slot, num_bytes)
        return FAULTS[fault](piece) if fault and count == MIDDLE else piece

    Gloo.landed = faulty
    place = {"segment": NAME, "host": "", "address": address, "timeout_s": timeout_s, "broadcast_s": step_s}
    with closing(subscribe("collective", **place)) as subscriber:
        source: Any = subscriber._source
        source._member = name
        pipe.send("here")
        while True:
            version, fault = pipe.recv()
            count = 0
            try:
                staged = subscriber.stage(0, version)
            except WeightsError as error:
                pipe.send((str(error), source.num_received))
            else:
                equal = all(torch.equal(staged.tensors[key], value) for key, value in weights(staged.version))
                pipe.send((staged.digest if equal else "torn", source.num_received))


class Generator:
    def __init__(self, name: str, address: str, step_s: float, timeout_s: float = PATIENCE_S):
        self.name = name
        self._pipe, theirs = _server.Pipe()
        work = (theirs, name, address, step_s, timeout_s)
        self.process: BaseProcess = _server.Process(target=generate, args=work, daemon=True)
        self.process.start()
        theirs.close()
        assert self._answer() == "here"

    def want(self, version: int, fault: str = "") -> None:
        self._pipe.send((version, fault))

    def got(self) -> tuple[str, int]:
        """Digest of what it staged, and how many broadcasts brought it something so far."""
        return self._answer()

    def _answer(self) -> Any:
        assert self._pipe.poll(PATIENCE_S), f"{self.name} says nothing"
        return self._pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self._pipe.close()
        self.process.join(10)


class Cast:
    """A publisher, its server with a broadcaster, and generators."""

    def __init__(self, stack: ExitStack, num: int, step_s: float):
        self.publisher = stack.enter_context(closing(Publisher(NAME, MANIFEST)))
        self.broadcaster = Broadcaster(NAME, "127.0.0.1", step_s=step_s, whole_s=PATIENCE_S / 2)
        server = stack.enter_context(closing(Server(NAME, "127.0.0.1", caller=self.broadcaster)))
        self._stack, self._step_s, self._address = stack, step_s, f"tcp://127.0.0.1:{server.port}"
        self.generators = [self.another(f"g{number}") for number in range(num)]
        self.broadcaster._expected = {generator.name for generator in self.generators}

    def another(self, name: str) -> Generator:
        return self._stack.enter_context(closing(Generator(name, self._address, self._step_s)))

    def publish(self, version: int, fault: str = "") -> str:
        """Publishes, and has all want it; in the middle of it the first meets `fault`."""
        digest = self.publisher.publish(0, version, weights(version))
        for number, generator in enumerate(self.generators):
            generator.want(version, "" if number else fault)
        return digest


@pytest.fixture
def cast(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, float], Cast]]:
    """Makes a cast of so many generators, whose broadcasts have so many seconds for a step."""
    monkeypatch.setattr(Gloo, "piece_bytes", PIECE_BYTES)
    with ExitStack() as stack:

        def make(num: int, step_s: float) -> Cast:
            monkeypatch.setattr(collective, "GATHER", GATHER_S / step_s)
            return Cast(stack, num, step_s)

        yield make


def test_all_get_each_version_through_one_group(cast: Callable[[int, float], Cast]) -> None:
    job = cast(3, 20.0)
    for version in (1, 2, 3):
        digest = job.publish(version)
        assert [generator.got() for generator in job.generators] == [(digest, version)] * 3
    assert job.broadcaster._epoch == 1 and job.broadcaster.num_broken == 0


@pytest.mark.parametrize(("fault", "step_s"), [("killed", 20.0), ("stopped", 4.0)])
def test_one_lost_in_the_middle_costs_the_others_time_alone(
    cast: Callable[[int, float], Cast], fault: str, step_s: float
) -> None:
    job = cast(3, step_s)
    digest = job.publish(1)
    assert [generator.got() for generator in job.generators] == [(digest, 1)] * 3
    lost, *others = job.generators
    begin = time.monotonic()
    second = job.publish(2, fault)
    assert [generator.got() for generator in others] == [(second, 1)] * 2  # by TCP
    assert time.monotonic() - begin < 4 * step_s
    job.generators = others
    digest = job.publish(3)
    assert [generator.got() for generator in others] == [(digest, 2)] * 2
    assert job.broadcaster._epoch == 2 and job.broadcaster.num_broken == 1
    if fault == "stopped":
        assert lost.process.pid is not None
        os.kill(lost.process.pid, signal.SIGCONT)
        assert lost.got() == (second, 1)  # by TCP, like the others
        job.generators.append(lost)
        fourth = job.publish(4)  # nobody expects it yet, so it may be late
        found = [generator.got() for generator in job.generators]
        assert {digest for digest, _ in found} == {fourth}
        fifth = job.publish(5)
        assert [generator.got() for generator in job.generators] == [(fifth, num + 1) for _, num in found]


def test_who_comes_late_is_in_the_next_epoch(cast: Callable[[int, float], Cast]) -> None:
    job = cast(2, 20.0)
    digest = job.publish(1)
    assert [generator.got() for generator in job.generators] == [(digest, 1)] * 2
    late = job.another("late")
    late.want(1)
    assert late.got() == (digest, 0)
    job.generators.append(late)
    digest = job.publish(2)
    assert [generator.got() for generator in job.generators] == [(digest, 2), (digest, 2), (digest, 1)]
    assert job.broadcaster._epoch == 2


def test_a_damaged_piece_is_noticed(cast: Callable[[int, float], Cast]) -> None:
    job = cast(2, 20.0)
    digest = job.publish(1, "damaged")
    assert [generator.got() for generator in job.generators] == [(digest, 0), (digest, 1)]
    digest = job.publish(2)
    assert [generator.got() for generator in job.generators] == [(digest, 1), (digest, 2)]
    assert job.broadcaster._epoch == 2


def test_what_is_overwritten_on_its_way_costs_no_group(
    cast: Callable[[int, float], Cast], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = cast(2, 20.0)
    digest = job.publish(1)
    assert [generator.got() for generator in job.generators] == [(digest, 1)] * 2
    send, left, newer = Gloo.send, MIDDLE, list[str]()

    def overtaken(self: Gloo, slot: int, piece: torch.Tensor) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            newer.extend(job.publisher.publish(0, version, weights(version)) for version in (3, 4))
        return send(self, slot, piece)

    monkeypatch.setattr(Gloo, "send", overtaken)
    job.publish(2)
    assert [generator.got() for generator in job.generators] == [(newer[-1], 2)] * 2
    assert job.broadcaster._epoch == 1


def test_who_was_called_and_does_not_come_is_not_waited_for(
    cast: Callable[[int, float], Cast],
) -> None:
    job = cast(2, 4.0)
    job.broadcaster._expected.add("gone")
    digest = job.publisher.publish(0, 1, weights(1))
    entry = Enter(job.broadcaster._segment.headers()[0], "payload", "gone", 0, "127.0.0.1", "")
    job.broadcaster.enter(b"nobody", entry, time.monotonic())
    begin = time.monotonic()
    for generator in job.generators:
        generator.want(1)
    assert [generator.got() for generator in job.generators] == [(digest, 0)] * 2
    assert time.monotonic() - begin < 4 * 4.0


def test_a_source_that_dies_is_an_error_and_no_hang() -> None:
    with ExitStack() as stack:
        publisher = stack.enter_context(closing(Publisher(NAME, MANIFEST)))
        ours, theirs = _server.Pipe()
        source = _server.Process(target=serve_and_die, args=(theirs, NAME, ["g0", "g1"]), daemon=True)
        source.start()
        stack.callback(source.kill)
        assert ours.poll(PATIENCE_S)
        address = f"tcp://127.0.0.1:{ours.recv()}"
        both = [stack.enter_context(closing(Generator(name, address, 20.0, timeout_s=2.0))) for name in ("g0", "g1")]
        publisher.publish(0, 1, weights(1))
        for generator in both:
            generator.want(1)
        for generator in both:
            text, num_received = generator.got()
            assert "no answer in 2.0 s" in text and num_received == 0


def serve_and_die(pipe: Connection, segment: str, names: list[str]) -> None:
    """A server whose process ends in the middle of its first broadcast."""
    Gloo.piece_bytes = PIECE_BYTES
    send = Gloo.send

    def dying(self: Gloo, slot: int, piece: torch.Tensor) -> Any:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return send(self, slot, piece)

    left, Gloo.send = MIDDLE, dying
    broadcaster = Broadcaster(segment, "127.0.0.1", step_s=20.0, whole_s=20.0)
    broadcaster._expected = set(names)
    server = Server(segment, "127.0.0.1", caller=broadcaster)
    pipe.send(server.port)
    signal.pause()


class Stuck(Gloo):
    """A group in which nothing ever lands, whatever its timeouts say; as one whose peer hangs in a driver may be."""

    def __init__(self, free: Event):
        self._free, self._ring = free, [torch.full((self.piece_bytes,), 7, dtype=torch.uint8) for _ in range(3)]

    def receive(self, slot: int, num_bytes: int) -> None:
        pass

    def wait(self, work: Any) -> None:
        self._free.wait(PATIENCE_S)

    def close(self) -> None:
        pass


def test_a_group_that_hangs_is_left_and_writes_into_no_version() -> None:
    free, into = Event(), torch.zeros(100_000, dtype=torch.uint8)
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        group.receive(lambda: Stuck(free), into, begin + 0.2)
    assert time.monotonic() - begin < PATIENCE_S / 2
    thread = next(thread for thread in enumerate_threads() if thread.name == "weights-group")
    free.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and not into.any()


# ---- who takes part ----


@pytest.fixture
def muster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Broadcaster, Publisher]]:
    """A broadcaster whose broadcasts end when the test says so."""
    monkeypatch.setattr(Broadcaster, "_broadcast", lambda *work: None)
    with closing(Publisher(NAME, MANIFEST)) as publisher:
        with closing(Broadcaster(NAME, "127.0.0.1", step_s=10.0, whole_s=30.0)) as broadcaster:
            yield broadcaster, publisher


def published(publisher: Publisher, version: int) -> Header:
    publisher.publish(0, version, weights(version))
    assert publisher._segment is not None
    return publisher._segment.headers()[0]


def entered(broadcaster: Broadcaster, header: Header, names: str, now: float, epoch: int = 0) -> None:
    for name in names:
        broadcaster.enter(name.encode(), Enter(header, "payload", name, epoch, "127.0.0.1", ""), now)


def answers(broadcaster: Broadcaster, now: float) -> dict[str, tuple[int, int] | None]:
    """To whom what is said: epoch and rank, or none."""
    said = {client.decode(): call for client, call in broadcaster.turn(now)}
    return {name: (call.epoch, call.rank) if isinstance(call, Call) else None for name, call in said.items()}


def end(broadcaster: Broadcaster, *, well: bool = True) -> None:
    assert broadcaster._round is not None
    kept: Any = SimpleNamespace(close=lambda: None) if well else None
    broadcaster._round.group, broadcaster._round.done = kept, True


def test_the_first_moment_is_waited_for_and_then_who_is_expected(muster: tuple[Broadcaster, Publisher]) -> None:
    broadcaster, publisher = muster
    header = published(publisher, 1)
    entered(broadcaster, header, "ba", 0.0)
    assert answers(broadcaster, 0.9) == {} and broadcaster.deadline == 1.0
    assert answers(broadcaster, 1.0) == {"a": (1, 1), "b": (1, 2)}
    end(broadcaster)
    assert answers(broadcaster, 1.1) == {}
    entered(broadcaster, header, "c", 1.1)  # late: it is expected from now on
    assert answers(broadcaster, 1.1) == {"c": None}
    header = published(publisher, 2)
    entered(broadcaster, header, "ab", 2.0, epoch=1)
    assert answers(broadcaster, 2.0) == {}
    entered(broadcaster, header, "c", 2.1)
    assert answers(broadcaster, 2.1) == {"a": (2, 1), "b": (2, 2), "c": (2, 3)}
    end(broadcaster)
    entered(broadcaster, published(publisher, 3), "cab", 3.0, epoch=2)
    assert answers(broadcaster, 3.0) == {"a": (2, 1), "b": (2, 2), "c": (2, 3)}


def test_who_is_gone_is_waited_for_once(muster: tuple[Broadcaster, Publisher]) -> None:
    broadcaster, publisher = muster
    broadcaster._expected = {"a", "b"}
    entered(broadcaster, published(publisher, 1), "ab", 0.0)
    assert answers(broadcaster, 0.0) == {"a": (1, 1), "b": (1, 2)}
    end(broadcaster, well=False)
    header = published(publisher, 2)
    entered(broadcaster, header, "a", 1.0)
    assert answers(broadcaster, 1.5) == {} and broadcaster.num_broken == 1
    assert answers(broadcaster, 2.0) == {"a": (2, 1)}
    end(broadcaster)
    entered(broadcaster, published(publisher, 3), "a", 3.0, epoch=2)
    assert answers(broadcaster, 3.0) == {"a": (2, 1)}


@pytest.mark.parametrize("epochs", [(0, 1), (1, 0)])
def test_a_group_that_one_has_lost_is_made_anew(muster: tuple[Broadcaster, Publisher], epochs: tuple[int, int]) -> None:
    broadcaster, publisher = muster
    broadcaster._expected = {"a", "b"}
    entered(broadcaster, published(publisher, 1), "ab", 0.0)
    assert len(answers(broadcaster, 0.0)) == 2
    end(broadcaster)
    header = published(publisher, 2)
    for name, epoch in zip("ab", epochs, strict=True):
        entered(broadcaster, header, name, 1.0, epoch)
    assert answers(broadcaster, 1.0) == {"a": (2, 1), "b": (2, 2)}


def test_a_newer_version_supersedes_and_an_older_one_is_refused(muster: tuple[Broadcaster, Publisher]) -> None:
    broadcaster, publisher = muster
    broadcaster._expected = {"a", "b", "c", "e"}
    first, second = published(publisher, 1), published(publisher, 2)
    entered(broadcaster, first, "ab", 0.0)
    assert answers(broadcaster, 0.0) == {}
    entered(broadcaster, second, "c", 0.1)
    assert answers(broadcaster, 0.1) == {"a": None, "b": None}
    entered(broadcaster, first, "d", 0.2)
    assert answers(broadcaster, 0.2) == {"d": None}
    entered(broadcaster, second, "e", 0.3)
    assert answers(broadcaster, 0.3) == {"c": (1, 1), "e": (1, 2)}  # who was refused will not come
    assert broadcaster._expected == {"a", "b", "c", "d", "e"}  # until the next time
    end(broadcaster)
    assert answers(broadcaster, 0.4) == {}
    overwritten, *_ = [published(publisher, version) for version in (3, 4, 5)]
    entered(broadcaster, overwritten, "a", 0.4)
    assert answers(broadcaster, 0.4) == {"a": None}


def test_a_round_that_never_ends_is_left_behind(muster: tuple[Broadcaster, Publisher]) -> None:
    broadcaster, publisher = muster
    broadcaster._expected = {"a"}
    entered(broadcaster, published(publisher, 1), "a", 0.0)
    assert answers(broadcaster, 0.0) == {"a": (1, 1)} and broadcaster.deadline == 30.0
    header = published(publisher, 2)
    entered(broadcaster, header, "b", 1.0)
    assert answers(broadcaster, 1.0) == {"b": None}  # by TCP: the source is busy
    entered(broadcaster, header, "a", 29.0)
    assert answers(broadcaster, 29.5) == {}
    assert answers(broadcaster, 30.1) == {"a": (2, 1)} and broadcaster.num_broken == 1


def test_a_server_without_a_source_of_broadcasts_sends_all_to_tcp() -> None:
    with closing(Publisher(NAME, MANIFEST)) as publisher, closing(Server(NAME, "127.0.0.1")) as server:
        digest = publisher.publish(0, 1, weights(1))
        place = {"segment": NAME, "host": "", "address": f"tcp://127.0.0.1:{server.port}", "timeout_s": 20.0}
        with closing(subscribe("collective", **place)) as subscriber:
            assert subscriber.stage(0, 1).digest == digest


def test_a_network_that_is_not_trusted_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights.route = 'collective': .* needs placement.trusted = true"):
        load(SMALL, ["--weights.route=collective"])
    assert load(SMALL, ["--weights.route=collective", "--placement.trusted=true"]).weights.route == "collective"

"""Versions by broadcast: one process group of the learner's host and the generators, made anew whenever one is lost.

A generator enters for what it wants by the connection that TCP would use; the source calls those who entered within a
moment, or at once when all whom it expects are there, and broadcasts to them. Who is not called or sees the broadcast
fail reads the same bytes through TCP. A group lasts as long as all of it enter again; else the next epoch begins.
Threads that wait for a group are waited for until a deadline and then left to themselves: what they hold is theirs
alone.

The group itself has neither keys nor encryption, so it is for trusted networks.
"""

import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from time import monotonic
from uuid import uuid4

import torch
import torch.distributed as dist

from engine.keys import JoinKey
from engine.ops import buckets
from engine.weights import group
from engine.weights.group import Group
from engine.weights.manifest import HOST, WeightsError
from engine.weights.segment import Header, Overwritten, Part, Segment
from engine.weights.tcp import Apart, Call, Enter, TcpSource

GATHER = 0.1  # of `step_s`: how long who entered first waits for the others
WHOLE = 0.5  # of the time that a generator has for a version: TCP has the rest
ANSWER = 2  # times `step_s`: the source may have to see a dead member's end first
STRANGER = ""  # no member's name
ANYWHERE = "0.0.0.0"


@dataclass
class Gathering:
    """Who entered for the next broadcast; they wait until `until` for the others."""

    subject: tuple[Header, Part]
    until: float
    entered: dict[str, tuple[bytes, Enter]] = field(default_factory=dict)


@dataclass
class Round:
    """A broadcast under way."""

    members: list[str]  # rank 1 and up
    until: float
    done: bool = False
    group: Group | None = None  # when it is done, if it went well


class Broadcaster:
    """The learner's end, for the thread of a `Server`: nothing here waits. Each step of a broadcast may take `step_s`
    seconds and the whole of it `whole_s`. `fileno` is readable when one has ended."""

    def __init__(self, segment: str, bind: str, *, step_s: float, whole_s: float, device: str = "cpu"):
        self._segment = Segment.open(segment)
        self._bind, self._step_s, self._whole_s, self._device = bind, step_s, whole_s, device
        self._gpu = group.gpu(device)
        listener = socket.create_server((bind, 0))
        self._port = listener.getsockname()[1]
        self._store = dist.TCPStore(  # type: ignore[call-arg]
            self._host, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._epoch = 0
        self._group: Group | None = None
        self._members: list[str] = []  # of the group
        self._expected = {STRANGER}  # the first time nobody knows who will come, so the whole moment is waited for
        self._later: set[str] = set()  # expected from the next broadcast on
        self._gathering: Gathering | None = None
        self._round: Round | None = None
        self._last = (-1, -1)  # the newest version that was broadcast
        self._apart: list[bytes] = []
        self.num_broken = 0  # broadcasts

    @property
    def _host(self) -> str:
        """By which the source itself reaches its store."""
        return "127.0.0.1" if self._bind == ANYWHERE else self._bind

    def fileno(self) -> int:
        return self._bell.fileno()

    @property
    def deadline(self) -> float | None:
        """When `turn` has something to do at the latest."""
        waits = self._round or self._gathering
        return None if waits is None else waits.until

    def enter(self, client: bytes, entry: Enter, now: float) -> None:
        """`client` waits for an answer, which `turn` will give."""
        self._expected.add(entry.member)
        outside = self._round is not None and entry.member not in self._round.members
        if outside or entry.header.age <= self._last or entry.header not in self._segment.headers():
            self._refuse(client, entry.member)
            return
        newer = self._gathering is not None and entry.header.age > self._gathering.subject[0].age
        if self._gathering is None or newer:
            for member, (other, _) in self._gathering.entered.items() if self._gathering else ():
                self._refuse(other, member)
            self._gathering = Gathering((entry.header, entry.part), now + GATHER * self._step_s)
        if self._gathering.subject == (entry.header, entry.part):
            self._gathering.entered[entry.member] = (client, entry)
        else:
            self._refuse(client, entry.member)

    def _refuse(self, client: bytes, member: str) -> None:
        self._apart.append(client)
        if self._gathering is not None:  # it does not wait for who will not come
            self._expected.discard(member)
            self._later.add(member)

    def turn(self, now: float) -> Iterator[tuple[bytes, Call | Apart]]:
        """The answers that are due."""
        with suppress(BlockingIOError):
            self._bell.recv(64)
        if self._round is not None and (self._round.done or now >= self._round.until):
            self._end(self._round)
        gathering = self._gathering
        if gathering is not None and self._round is None:
            if self._expected <= gathering.entered.keys() or now >= gathering.until:
                self._gathering = None
                yield from self._call(gathering, now)
        for client in self._apart:
            yield client, Apart()
        self._apart = []

    def _end(self, ended: Round) -> None:
        self._round = None
        self._members, self._group = ended.members, ended.group
        self.num_broken += ended.group is None

    def _call(self, gathering: Gathering, now: float) -> Iterator[tuple[bytes, Call]]:
        """Calls all who entered, and begins the broadcast."""
        members = sorted(gathering.entered)
        entries = [gathering.entered[member][1] for member in members]
        old, self._group = self._group, None
        keeps = old is not None and self._members == members and {entry.epoch for entry in entries} == {self._epoch}
        self._epoch += not keeps
        backend = group.backend_for([self._gpu, *(entry.gpu for entry in entries)])
        calls = [Call(self._epoch, rank, len(members) + 1, self._port, backend) for rank in range(len(members) + 1)]
        for member, call in zip(members, calls[1:], strict=True):
            yield gathering.entered[member][0], call
        header, part = gathering.subject
        self._expected, self._later, self._last = {*members, *self._later}, set(), header.age
        self._round = Round(members, now + self._whole_s)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the memory is not writable: nothing here writes
            payload = torch.from_numpy(self._segment.view(header, part, slice(None)))
        work = (self._round, calls[0], old, keeps, payload, entries[0].address)
        Thread(target=self._broadcast, args=work, name=f"version {header.version}", daemon=True).start()

    def _broadcast(
        self, round_: Round, call: Call, old: Group | None, keeps: bool, payload: torch.Tensor, peer: str
    ) -> None:
        """In a thread of its own, which nobody waits for."""
        its_group = old
        try:
            if its_group is None or not keeps:
                if its_group is not None:
                    its_group.close()
                its_group = None
                address = group.facing(peer) if self._bind == ANYWHERE else self._bind
                its_group = group.make(call, self._host, address, self._step_s, self._device)
                print(f"weights: epoch {call.epoch}, to {call.size - 1} generators by {call.backend}", flush=True)
            group.send(its_group, payload, round_.until)
            round_.group = its_group
        except (RuntimeError, OSError) as error:
            _say(f"broadcast to {call.size - 1} generators, epoch {call.epoch}", error)
            if its_group is not None:
                its_group.close()
        finally:
            round_.done = True
            with suppress(OSError):  # it is closed
                self._rope.send(b".")

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._bell.close()
        self._rope.close()
        self._segment.close()


class CollectiveSource:
    """A `Source` by broadcast, from a `Server` at `address` that has a `Broadcaster`; else, and where that fails, by
    TCP. `timeout_s` is for a version, `step_s` for each step of a broadcast."""

    far = True
    device = HOST

    def __init__(self, address: str, timeout_s: float, key: JoinKey | None, step_s: float, device: str = "cpu"):
        self._tcp = TcpSource(address, timeout_s, key)
        self.manifest, self.headers = self._tcp.manifest, self._tcp.headers
        self._host = address.removeprefix("tcp://").rpartition(":")[0]
        self._address = group.facing(self._host)
        self._step_s, self._whole_s, self._device = step_s, WHOLE * timeout_s, device
        self._gpu = group.gpu(device)
        self._member = uuid4().hex
        self._epoch = 0  # of the group; 0: there is none
        self._group: Group | None = None
        self.num_received = 0  # broadcasts

    def read(self, header: Header, part: Part, into: torch.Tensor) -> Iterator[tuple[slice, int]]:
        try:
            total = self._broadcast(header, part, into)
        except (WeightsError, RuntimeError, OSError) as error:
            _say(f"broadcast of version {header.version}, which comes by TCP instead", error)
            total = None
        if total is None:
            yield from self._tcp.read(header, part, into)
        else:
            self.num_received += 1
            yield slice(0, len(into)), total

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._tcp.close()

    def _broadcast(self, header: Header, part: Part, into: torch.Tensor) -> int | None:
        """Fills `into`; the sum over it. None where this member is not called."""
        until = monotonic() + self._whole_s
        entry = Enter(header, part, self._member, self._epoch, self._address, self._gpu)
        call = self._tcp.enter(entry, ANSWER * self._step_s)
        if call is None:
            return None
        old, keeps = self._group, call.epoch == self._epoch
        self._epoch, self._group = 0, None

        def make() -> Group:
            if old is not None and keeps:
                return old
            if old is not None:
                old.close()
            return group.make(call, self._host, self._address, self._step_s, self._device)

        its_group, total = group.receive(make, into, until)
        whole = part == "delta" or buckets.digest(total, len(into)) == header.digest  # a delta shows when it is applied
        if whole or header not in self.headers():
            self._epoch, self._group = call.epoch, its_group
        if not whole and self._group is None:
            its_group.close()
            raise WeightsError("it came damaged")
        if not whole:
            raise Overwritten
        return total


def _say(what: str, error: Exception) -> None:
    print(f"leeway: {what}: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)

"""Random histories against the coordinator: stragglers, filters, failed groups, dead generators, lost and repeated
messages, late joiners, slow weights, crashes and resumes. Conservation and the staleness bound hold at every step.

The model beside it keeps its own books, from what it sent and received alone.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import fake_run
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.coordinator import Coordinator
from engine.ledger import Ledger
from engine.schema import Group, Heartbeat, Kind, Lease, LeaseKey, Taken, Trained

MAX_HELD = 4  # groups that a generator samples together
LEASE_S, PUBLISH_S, GROUP_S = 20.0, 30.0, 90.0
NAMES = ("one", "two", "three")
picks = st.randoms(use_true_random=False)


@dataclass
class Generator:
    """A generator as the network sees it: it holds leases that reached it, and may be slow to apply weights."""

    version: int = -1
    held: list[tuple[Lease, int]] = field(default_factory=list)  # and the version of the first token


@dataclass
class Books:
    """What the surviving lineage did so far, by the model's own count."""

    version: int = 0
    ends: dict[int, str] = field(default_factory=dict)
    trained_at: dict[int, int] = field(default_factory=dict)
    num_drawn: int = 0

    def copy(self) -> "Books":
        return Books(self.version, dict(self.ends), dict(self.trained_at), self.num_drawn)


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.directory = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self.now = 0.0
        self.generators: dict[str, Generator] = {}
        self.sent: list[Group] = []  # results that may be delivered again
        self.attempts: dict[tuple[Kind, int], int] = {}  # of each group's newest lease
        self.books = Books()
        self.taken: Taken | None = None
        self.published = -1
        self.snapshot: tuple[bytes | None, Books] = (None, Books())

    @initialize(max_staleness=st.integers(0, 3), groups_per_step=st.integers(1, 3), num_generators=st.integers(1, 3))
    def start(self, max_staleness: int, groups_per_step: int, num_generators: int) -> None:
        self.config = fake_run.config(
            max_staleness=max_staleness,
            groups_per_step=groups_per_step,
            lease_s=LEASE_S,
            publish_s=PUBLISH_S,
            group_s=GROUP_S,
        )
        self.open(None)
        for name in NAMES[:num_generators]:
            self.join(name)
            self.switch(name, [])

    def open(self, snapshot: bytes | None) -> None:
        self.ledger = Ledger(Path(self.directory.name) / "ledger.db")
        self.coordinator = Coordinator(self.config, fake_run.CountingPrompts(), self.ledger, fake_run.raw_scores)
        self.incarnation = self.coordinator.begin(self.now, snapshot)
        self.publish()

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
        self.directory.cleanup()

    # ---- the world acts

    def publish(self) -> None:
        self.published = self.books.version
        self.coordinator.published(self.published, self.now)

    def grant(self, lost: bool = False) -> None:
        """Everything that the coordinator grants is booked; `lost` messages never reach their generator."""
        for name, leases in self.coordinator.grants(self.now).items():
            for lease in leases:
                self.check_lease(name, lease)
                if not lost:
                    self.generators[name].held.append((lease, lease.version))

    def check_lease(self, name: str, lease: Lease) -> None:
        self.attempts[lease.kind, lease.group_id] = lease.attempt
        if lease.kind != "train":
            return
        assert lease.prompt.index == lease.group_id, "a group has another draw's prompt"
        assert lease.group_id not in self.books.ends, "an ended group was leased"
        assert lease.version == self.generators[name].version, "leased to a generator with other weights"
        assert lease.version == max(generator.version for generator in self.routed().values())
        self.books.num_drawn = max(self.books.num_drawn, lease.group_id + 1)
        if self.config.run.max_staleness == 0:
            assert lease.version == self.books.version, "not on policy"

    def routed(self) -> dict[str, Generator]:
        members = self.coordinator.roster.members
        return {name: self.generators[name] for name, member in members.items() if member.routed}

    @rule(name=st.sampled_from(NAMES))
    def join(self, name: str) -> None:
        self.abandon(name)
        self.generators[name] = Generator()
        self.coordinator.join(name, self.now)

    def members(self) -> list[str]:
        return [name for name in self.generators if self.coordinator.has(name)]

    @precondition(lambda self: self.members())
    @rule(pick=picks, num_samples=st.integers(0, 12), lost=st.booleans())
    def request(self, pick: Random, num_samples: int, lost: bool) -> None:
        self.coordinator.request(pick.choice(self.members()), num_samples, self.now)
        self.grant(lost)

    @precondition(lambda self: self.members())
    @rule(pick=picks, late=st.integers(0, 2))
    def apply(self, pick: Random, late: int) -> None:
        """Generators switch to the published weights, all but `late` of them; some leases have not begun by then."""
        for name in pick.sample(self.members(), len(self.members()))[late:]:
            self.switch(name, [index for index, _ in enumerate(self.generators[name].held) if pick.random() < 0.3])

    def switch(self, name: str, begin_later: list[int], behind: int = 0) -> None:
        """One generator switches, to a version `behind` the newest if it was busy staging that."""
        generator = self.generators[name]
        generator.version = max(generator.version, self.published - behind, 0)
        for index in begin_later:
            generator.held[index] = (generator.held[index][0], generator.version)
        self.coordinator.applied(name, fake_run.applied(generator.version, self.incarnation), self.now)
        self.ask(name)

    def ask(self, name: str) -> None:
        """What a generator with free slots does after every change."""
        self.coordinator.request(name, 2 * MAX_HELD - 2 * len(self.generators[name].held), self.now)
        self.grant()

    def holders(self) -> list[str]:
        return [name for name in self.members() if self.generators[name].held]

    @precondition(lambda self: self.holders())
    @rule(pick=picks, fate=st.sampled_from(["good"] * 5 + ["uniform", "invalid", "lost"]))
    def finish(self, pick: Random, fate: str) -> None:
        """One lease finishes, and need not be the oldest; the message may get lost, and be repeated later."""
        self.finish_one(pick.choice(self.holders()), pick, fate)

    @rule(pick=picks, patience=st.integers(0, 3))
    def finish_many(self, pick: Random, patience: int) -> None:
        """All finish but for `patience` stragglers a generator."""
        for name in self.holders():
            while self.coordinator.has(name) and len(self.generators[name].held) > patience:
                self.finish_one(name, pick, "good", ask=False)
            self.ask(name)

    def abandon(self, name: str) -> None:
        """What a generator that went had finished may still be on the wire."""
        for lease, first in self.generators.pop(name, Generator()).held:
            self.sent.append(fake_run.result(lease, self.incarnation, generator=name, versions=[first]))

    def finish_one(self, name: str, pick: Random, fate: str, ask: bool = True) -> None:
        generator = self.generators[name]
        lease, first = generator.held.pop(pick.randrange(len(generator.held)))
        group = fake_run.result(
            lease,
            self.incarnation,
            generator=name,
            versions=[first, generator.version],
            scores=(lambda sample: 1.0) if fate == "uniform" else float,
            errors=1 if fate == "invalid" else 0,
        )
        self.sent.append(group)
        if fate != "lost":
            self.deliver(group)
        if ask:
            self.ask(name)

    @precondition(lambda self: self.sent)
    @rule(pick=picks)
    def repeat(self, pick: Random) -> None:
        self.deliver(pick.choice(self.sent))

    def repeat_late(self, random: Random) -> None:
        if self.sent:
            self.deliver(random.choice(self.sent[-20:]))

    def deliver(self, group: Group) -> None:
        ack = self.coordinator.arrived(group, self.now)
        assert (ack.group_id, ack.attempt) == (group.group_id, group.attempt)
        over = group.kind == "train" and group.group_id in self.books.ends
        newest = self.attempts.get((group.kind, group.group_id))
        if over or group.incarnation != self.incarnation or group.attempt != newest:
            assert ack.reason, "a fenced, repeated or superseded result was accepted"
        if not ack.reason and group.kind == "train":
            if any(verdict.error for verdict in group.verdicts):
                self.books.ends[group.group_id] = "failed"
            elif group.verdicts[0].score == group.verdicts[1].score:
                self.books.ends[group.group_id] = "filtered"
        self.grant()

    @precondition(lambda self: self.members())
    @rule(pick=picks)
    def leave(self, pick: Random) -> None:
        name = pick.choice(self.members())
        self.coordinator.leave(name, "left", self.now)
        self.abandon(name)
        self.grant()

    @precondition(lambda self: self.members())
    @rule(pick=picks)
    def beat(self, pick: Random) -> None:
        self.beat_of(pick.choice(self.members()))

    def beat_of(self, name: str) -> None:
        held = [lease.key for lease, _ in self.generators[name].held]
        over = self.coordinator.heartbeat(name, Heartbeat(held, 0, 0.0, 0.0), self.now)
        self.adopt_failures()
        self.cancel(name, over)
        self.grant()

    def cancel(self, name: str, over: list[LeaseKey]) -> None:
        """A generator lets go of what is over; what it may keep is of use."""
        generator = self.generators[name]
        for lease, _ in generator.held:
            ended = lease.kind == "train" and lease.group_id in self.books.ends
            newest = lease.attempt == self.attempts[lease.kind, lease.group_id]
            assert newest and not ended or lease.key in over, "what is over was not cancelled"
            if lease.key in over:
                result = fake_run.result(lease, self.incarnation, generator=name, versions=[generator.version])
                assert self.coordinator.arrived(result, self.now).reason, "what is wanted was cancelled"
        generator.held = [(lease, first) for lease, first in generator.held if lease.key not in over]

    @rule(seconds=st.sampled_from([1.0, 5.0, 21.0, 31.0, 91.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.coordinator.tick(self.now)
        self.grant()
        self.adopt_failures()

    @rule()
    def overrun(self) -> None:
        """Generators live and are slow: what they hold goes to others, or to them again, and they are told."""
        ends = self.now + GROUP_S
        while self.now < ends:
            self.wait(LEASE_S - 1.0)
            for name in self.members():
                self.beat_of(name)

    @rule()
    def evaluate(self) -> None:
        self.coordinator.evaluate("while training", "eval", False, self.now)

    def adopt_failures(self) -> None:
        """Groups given up for too many lost leases; which ones is the coordinator's business, that they then stay
        so is ours."""
        query = "SELECT group_id FROM groups WHERE state = 'failed' AND reason LIKE '%attempts%'"
        for (group_id,) in self.ledger._db.execute(query):
            self.books.ends.setdefault(group_id, "failed")

    # ---- the learner acts

    @rule(skipped=st.booleans(), several=st.integers(1, 3))
    def learn(self, skipped: bool, several: int) -> None:
        """The learner goes on as far as it can, up to `several` takes, with weights that nobody applied yet."""
        for _ in range(several):
            if self.taken is None:
                self.take()
            if self.taken is not None:
                self.train(skipped)

    @rule(random=st.randoms(use_true_random=True), num_acts=st.sampled_from([20, 150]))
    def days(self, random: Random, num_acts: int) -> None:
        """Many acts in a row, mostly good, so that histories get long and generators drift apart."""
        for _ in range(num_acts):
            act = random.choices(list(ACTS), [weight for weight, _ in ACTS.values()])[0]
            if act in ("switch", "switch_late", "leave", "beat") and not self.members():
                self.join(random.choice(NAMES))
            ACTS[act][1](self, random)
            self.conservation()
            self.tickets()

    @precondition(lambda self: self.taken is None)
    @rule()
    def take(self) -> None:
        version, bound = self.books.version, self.config.run.max_staleness
        self.taken = self.coordinator.take(self.config.run.groups_per_step, version, self.now)
        for group in self.taken.groups if self.taken else ():
            assert group.group_id not in self.books.trained_at, "trained twice"
            assert group.group_id not in self.books.ends, "trained after its end"
            assert version - group.first_version <= bound, "beyond the staleness bound"
            assert group.first_version <= version
            if bound == 0:
                assert set(group.versions.tolist()) == {version}, "not on policy"
        if self.taken:
            ids = [group.group_id for group in self.taken.groups]
            assert ids == sorted(ids)
            self.check_rest(version)

    def check_rest(self, version: int) -> None:
        """DESIGN's rule, word by word, over the ledger's rows."""
        bound, per_step = self.config.run.max_staleness, self.config.run.groups_per_step
        query = "SELECT coalesce(CASE state WHEN 'buffered' THEN first_version END, lease_version) FROM groups "
        rows = self.ledger._db.execute(query + "WHERE state IN ('buffered', 'leased')").fetchall()
        for later in range(version, version + bound + 2):
            due = sum(first + bound <= later for (first,) in rows)
            assert due <= (later - version) * per_step, f"{due} groups are due at {later}, after a take at {version}"

    def take_and_save(self) -> None:
        if self.taken is None:
            self.take()
        self.save()

    @precondition(lambda self: self.taken is not None)
    @rule(skipped=st.booleans())
    def train(self, skipped: bool) -> None:
        assert self.taken is not None
        end = "failed" if skipped else "trained"
        ids = [group.group_id for group in self.taken.groups]
        self.books.version += 1
        self.coordinator.trained(Trained(self.books.version, ids, end, "not finite" if skipped else ""))
        self.books.ends.update(dict.fromkeys(ids, end))
        self.books.trained_at.update(dict.fromkeys(ids, self.books.version))
        self.taken = None
        self.publish()
        self.grant()

    @rule()
    def save(self) -> None:
        self.adopt_failures()
        self.snapshot = self.coordinator.snapshot(self.books.version), self.books.copy()

    @precondition(lambda self: self.books.num_drawn > 3)
    @rule()
    def crash(self) -> None:
        """Everything dies at once and resumes from the last checkpoint; what is still on the wire stays there."""
        self.ledger.close()
        data, books = self.snapshot
        self.books, self.taken, self.generators = books.copy(), None, {}
        self.open(data)
        self.join("one")

    # ---- what always holds

    @invariant()
    def conservation(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        self.adopt_failures()
        counts, state = self.ledger.counts(), self.coordinator.state().ends
        ended = {end: list(self.books.ends.values()).count(end) for end in ("trained", "filtered", "failed", "expired")}
        assert self.ledger.audit() == []
        assert counts == state
        assert {end: counts[end] for end in ended} == ended
        assert counts["drawn"] == self.books.num_drawn == sum(ended.values()) + counts["in_flight"]

    @invariant()
    def tickets(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        tickets, run = self.coordinator.tickets, self.config.run
        assert tickets.capacity == (run.max_staleness + 1) * run.groups_per_step
        in_flight = self.ledger.counts()["in_flight"]
        oldest = min((generator.version for generator in self.routed().values()), default=tickets.settled)
        unapplied = sum(made > max(oldest, tickets.settled) for made in self.books.trained_at.values())
        assert tickets.num_held == in_flight + unapplied <= tickets.capacity


def finish_if_any(histories: Histories, random: Random) -> None:
    if histories.holders():
        fate = random.choices(["good", "uniform", "invalid", "lost"], [12, 2, 1, 2])[0]
        histories.finish_one(random.choice(histories.holders()), random, fate)


ACTS: dict[str, tuple[int, Callable[[Histories, Random], None]]] = {  # weight and act
    "finish": (30, finish_if_any),
    "finish_many": (5, lambda histories, random: histories.finish_many(random, random.randrange(3))),
    "learn": (12, lambda histories, random: histories.learn(random.random() < 0.1, random.randint(1, 2))),
    "switch": (12, lambda histories, random: histories.switch(random.choice(histories.members()), [])),
    "switch_late": (4, lambda histories, random: histories.switch(random.choice(histories.members()), [], 1)),
    "repeat": (8, lambda histories, random: histories.repeat_late(random)),
    "take_and_save": (2, lambda histories, random: histories.take_and_save()),
    "wait": (1, lambda histories, random: histories.wait(random.choice([1.0, 5.0, 31.0]))),
    "beat": (4, lambda histories, random: histories.beat(random)),
    "overrun": (1, lambda histories, random: histories.overrun()),
    "join": (2, lambda histories, random: histories.join(random.choice(NAMES))),
    "leave": (1, lambda histories, random: histories.leave(random)),
    "save": (2, lambda histories, random: histories.save()),
    "crash": (1, lambda histories, random: histories.crash()),
}

Histories.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
test_histories = Histories.TestCase

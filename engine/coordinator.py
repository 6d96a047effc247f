"""The state machine between prompts, generators and learner: who holds which group, and what became of it.

Pure and single-threaded: no socket, no clock. Methods take `now` (monotonic seconds) and have committed the ledger
when they return, so what they answer may be sent at once.

A group is drawn when a ticket is free and a generator asks; it is then leased, buffered, taken, trained; or pending
again after its lease was lost, or filtered, failed or expired on the way. Leases of evaluations and probes need no
ticket, stand in no ledger row and never meet the buffer.
"""

import json
from collections import Counter
from collections.abc import Callable

import msgspec

from engine.buffer import Buffer, Shape, Waiting, early_end
from engine.config import Config, ConfigError
from engine.draws import Draws, Prompts
from engine.evaluation import Surveys
from engine.leases import Leases
from engine.ledger import ENDS, Ledger
from engine.roster import Roster
from engine.schedule import Schedule
from engine.schema import (
    Ack,
    Applied,
    End,
    Evaluation,
    Failure,
    Granted,
    Group,
    Heartbeat,
    Kind,
    Lapsed,
    Lease,
    LeaseKey,
    Sampling,
    State,
    Taken,
    Took,
    Trained,
)
from engine.snapshot import Snapshot, pack, unpack
from engine.task import Task, followed, samplings
from engine.tickets import Tickets

COSTS = ("stage_s", "pause_s", "num_bytes", "link_share")  # of a version applied

MAX_FAILURES = 3  # leases of one group that end badly before it is given up
HOPELESS = 100  # groups that fail in a row, and all that can be in flight, before the job is

Note = Granted | Lapsed | Ack | Took


class Coordinator:
    """`version` is the learner's: that of the newest `Trained`, or the checkpoint's."""

    def __init__(
        self,
        config: Config,
        prompts: Prompts,
        ledger: Ledger,
        shape: Shape,
        note: Callable[[Note], None] = lambda note: None,
    ):
        """`note` is told every decision that does not follow from the messages alone, before the ledger is."""
        self.version = 0
        self.incarnation = -1
        self.tickets = Tickets(config.run.max_staleness, config.run.groups_per_step)
        self.buffer = Buffer(config.run.max_staleness)
        self.roster = Roster(config.deadlines)
        self.surveys = Surveys()
        self.draws = Draws(config, prompts, self.tickets)
        self._schedule = Schedule(config)
        self._temperature: float | None = None  # where it follows the entropy
        self._config = config
        self._prompts = prompts
        self._ledger = ledger
        self._shape = shape
        self._note = note
        self._leases = Leases(config.deadlines.group_s)
        self._taken: dict[int, Waiting] = {}
        self._failing: list[str] = []  # why each of the newest groups failed, back to one that did not
        self._filtered: list[int] = []  # since the last take
        self._filtered_before: list[int] = []  # the take under way, between the last one and this
        self._ends: Counter[str] = Counter()
        self._survey_turn = False

    # ---- start and checkpoint

    def begin(self, now: float, snapshot: bytes | None = None) -> int:
        """Opens a new incarnation on `snapshot` (None: a run from nothing) and returns its number. Called first, once.

        Everything after the snapshot is undone; what was leased then is leased anew, what was buffered or taken is in
        the buffer. Raises `ConfigError` for a snapshot that this engine or configuration cannot continue.
        """
        kept = Snapshot() if snapshot is None else unpack(snapshot)
        if len(kept.in_flight) > self.tickets.capacity:
            raise ConfigError(
                f"run.groups_per_step = {self._config.run.groups_per_step}: the checkpoint holds {len(kept.in_flight)} "
                f"groups in flight, but there are only {self.tickets.capacity} tickets"
            )
        self.incarnation = self._ledger.begin(kept.version, kept.step, kept.num_drawn, kept.in_flight)
        self.version, self.draws.num_drawn, self.surveys.num_tasks = kept.version, kept.num_drawn, kept.num_surveyed
        self._filtered, self.surveys.completed = kept.filtered, kept.evaluations
        self._temperature = kept.temperature
        self._ends.update({end: count for end, count in self._ledger.counts().items() if end in ENDS})
        if kept.prompts is not None:
            self._prompts.restore(kept.prompts)
        self.draws.recount(self._ledger.judged())
        self.tickets.settle(kept.version)
        for row in self._ledger.in_flight():
            self.draws.resume(row)
        for waiting in kept.waiting:
            self.buffer.admit(msgspec.structs.replace(waiting, arrived_s=now))
        for name in kept.surveys:
            self.evaluate(name, "eval", False, now)
        return self.incarnation

    def snapshot(self, step: int) -> bytes:
        """All that `begin` needs to go on from here. The ledger is on disk when this returns."""
        self._ledger.sync()
        return pack(
            Snapshot(
                version=self.version,
                step=step,
                num_drawn=self.draws.num_drawn,
                num_surveyed=self.surveys.num_tasks,
                temperature=self._temperature,
                prompts=self._prompts.state(),
                in_flight=self._ledger.in_flight(),
                waiting=[*self._taken.values(), *self.buffer.waiting()],
                filtered=self._filtered_before + self._filtered,
                surveys=self.surveys.under_way(),
                evaluations=self.surveys.completed,
            )
        )

    # ---- generators

    def has(self, generator: str) -> bool:
        """Whether the generator is a member. One that is not must join again, since what it held went to others."""
        return generator in self.roster.members

    def members(self) -> list[str]:
        return list(self.roster.members)

    def owed(self, generator: str) -> int | None:
        """The newest published version, where the generator has yet to apply it."""
        member, version = self.roster.members[generator], self.roster.published
        return version if member.applied < version else None

    def stalled(self, now: float) -> str:
        """Why no group comes that could be trained: none does any more, or no generator has sampled for long."""
        if len(self._failing) >= self._config.run.groups_per_step:
            return f"group after group fails; the first of them: {self._failing[0]}"
        return self.roster.stalled(now)

    @property
    def hopeless(self) -> str:
        """Why it is of no use to go on, where group after group fails: each of them is a prompt lost to the run."""
        if len(self._failing) < max(HOPELESS, self.tickets.capacity):
            return ""
        return f"{len(self._failing)} groups in a row failed; the first: {self._failing[0]}"

    def join(self, generator: str, now: float) -> None:
        """A generator joins. One that joins again has lost what it held. It is routed once it applied a version."""
        with self._ledger.transaction():
            if self.has(generator):
                self._drop(generator, "its generator started anew", now, blame=True)
            self.roster.join(generator, now)
            self._ledger.event("joined", generator=generator)

    def leave(self, generator: str, reason: str, now: float) -> None:
        """A generator left of its own will; what it held goes to others."""
        with self._ledger.transaction():
            self._drop(generator, reason, now, blame=False)

    def request(self, generator: str, num_samples: int, now: float) -> None:
        """Replaces the generator's earlier request. Groups are granted while it is above 0."""
        member = self.roster.members[generator]
        member.seen_s, member.num_wanted = now, num_samples

    def applied(self, generator: str, message: Applied, now: float) -> None:
        """The generator samples with another version from now on; what that cost goes to the ledger."""
        member = self.roster.members[generator]
        member.seen_s = now
        if message.incarnation != self.incarnation or message.version <= member.applied:  # said with every heartbeat
            return
        self.roster.apply(generator, message, self.tickets.settled, now)
        self.tickets.settle(self.roster.applied_by_all)
        with self._ledger.transaction():
            costs = json.dumps({name: getattr(message, name) for name in COSTS})
            self._ledger.event("applied", version=message.version, generator=generator, detail=costs)

    def heartbeat(self, generator: str, beat: Heartbeat, now: float) -> list[LeaseKey]:
        """A sign of life. A lease that was granted `heartbeat_s` before the last heartbeat and is not held now never
        arrived. Sooner than that, several heartbeats may have been under way when it was granted. Returns what is held
        and no longer leased: nobody wants its result."""
        member = self.roster.members[generator]
        before = member.beat_s - self._config.deadlines.heartbeat_s
        held = set(beat.held)
        leased = {task.lease_key: task for task in self._leases.held_by(generator)}
        lost = [task for key, task in leased.items() if task.leased_s < before and key not in held]
        member.seen_s = member.beat_s = now
        member.generated_tokens, member.busy_s, member.idle_s = beat.generated_tokens, beat.busy_s, beat.idle_s
        if lost:
            with self._ledger.transaction():
                for task in lost:
                    self._give_back(task, "the lease was lost on its way", now, blame=False)
        return sorted(held - leased.keys())

    def arrived(self, group: Group, now: float) -> Ack:
        """Takes a result in, once. An empty `reason` says that it was accepted, also where it ends at once as
        filtered or failed; otherwise it was refused for good."""
        if group.generator in self.roster.members:
            self.roster.members[group.generator].seen_s = now
        task = self._leases.find(group.kind, group.group_id)
        reason = self._refusal(group, task)
        with self._ledger.transaction():
            if reason or task is None:
                self._ledger.event("refused", group.group_id, group.lease_version, group.generator, reason)
            elif reason := task.defect(group, self.roster.published):
                self._give_back(task, reason, now, blame=True)
            else:
                self._accept(group, task, now)
            ack = Ack(group.kind, group.group_id, group.attempt, reason)
            self._note(ack)
        return ack

    def failure(self, generator: str, failure: Failure, now: float) -> Ack:
        """The generator gives a lease back; another attempt follows, up to `MAX_FAILURES`."""
        self.roster.members[generator].seen_s = now
        task = self._leases.find(failure.kind, failure.group_id)
        if task is not None and task.attempt == failure.attempt and task.generator == generator:
            with self._ledger.transaction():
                self._give_back(task, failure.reason, now, blame=True)
        return Ack(failure.kind, failure.group_id, failure.attempt)

    def grants(self, now: float) -> dict[str, list[Lease]]:
        """The leases to send now, by generator; all that can be granted at once. Called after other calls, in any
        number of them."""
        granted: dict[str, list[Lease]] = {}
        pinned = self.surveys.waited_for
        line = self.roster.line(pinned)
        if line.first is None:
            return granted
        with self._ledger.transaction():
            while (generator := line.first) and (task := self._next_task(pinned)):
                granted.setdefault(generator, []).append(self._grant(task, generator, line.version, now))
                line.grant(task.num_samples)
        return granted

    # ---- learner

    def take(self, num_groups: int, version: int, now: float) -> Taken | None:
        """The groups to train at `version`; None: the learner must wait, ask again after the next change. No groups
        at all once the prompts are exhausted, nothing is generated any more and the buffer holds too few."""
        overdue = self.buffer.expire(version)
        taken = self.buffer.take(num_groups, version, [task.version for task in self._leases.training()])
        if not overdue and taken is None:
            return self._none_left()
        with self._ledger.transaction():
            for waiting in overdue:
                self._end(waiting.group.group_id, waiting.group.domain, "expired", "every token is too old")
            if taken is None:
                return None
            self._taken.update((waiting.group.group_id, waiting) for waiting in taken)
            group_ids = [waiting.group.group_id for waiting in taken]
            self._note(Took(version, group_ids))
            self._ledger.taken(version, group_ids, self._filtered)
        self._filtered, self._filtered_before = [], self._filtered
        return Taken(
            groups=[waiting.group for waiting in taken],
            queue_s=[now - waiting.arrived_s for waiting in taken],
            arrival_versions=[waiting.arrival_version for waiting in taken],
            state=self.state(),
        )

    def _none_left(self) -> Taken | None:
        coming = self.draws.num_pending or self._leases.num_training
        return Taken([], [], [], self.state(), self.draws.end) if self.draws.end and not coming else None

    def trained(self, trained: Trained) -> None:
        """A take became `trained.version`. Its tickets return when that is applied everywhere, also after a skipped
        update: the take has moved the learner on, so new groups at the old version would come too late."""
        self.version, self._filtered_before = trained.version, []
        self._temperature = followed(self._config.generator, self._temperature, trained.entropy)
        self.tickets.hold(trained.group_ids, trained.version)
        with self._ledger.transaction():
            for group_id in trained.group_ids:
                end, domain = trained.end_of(group_id), self._taken.pop(group_id).group.domain
                self._record_end(group_id, domain, end, trained.reason if end == "failed" else "")

    def published(self, version: int, now: float) -> None:
        """The weights of `version` lie ready; generators have `publish_s` to apply them or newer ones. With the last
        step's all leases of training end: they would keep the evaluation that follows from its slots."""
        self.roster.publish(version, now)
        with self._ledger.transaction():
            self._ledger.event("published", version=version)
            for task in self._leases.training() if self._is_over else []:
                self._give_back(task, "the run is over", now, blame=False)

    def evaluate(self, name: str, kind: Kind, wait: bool, now: float) -> None:
        """Begins an evaluation or a probe. While one with `wait` is open nothing else is leased, and its leases go
        only to generators at the published version."""
        prompts = self.draws.probes() if kind == "probe" else self._prompts.held_out()
        sampled = samplings(self._schedule.at(self.version))[kind]
        self.surveys.begin(name, kind, wait, prompts, sampled, now)

    def evaluation(self, name: str) -> Evaluation | None:
        """The finished evaluation begun with `wait`, once; None while it goes on."""
        return self.surveys.evaluation(name)

    def probe(self, name: str) -> list[Group] | None:
        """The groups of a finished probe, once; None while it goes on."""
        return self.surveys.probe(name)

    def state(self) -> State:
        """The counts of this moment. Each evaluation finished without `wait` is handed out once."""
        completed, self.surveys.completed = self.surveys.completed, []
        in_flight = self.draws.tally.in_flight.total()
        generated_tokens, busy_s, idle_s = self.roster.totals()
        return State(
            ends={**{end: self._ends[end] for end in ENDS}, "in_flight": in_flight, "drawn": self.draws.num_drawn},
            buffered_groups=len(self.buffer),
            leased_groups=self._leases.num_training,
            generators={name: member.applied for name, member in self.roster.members.items()},
            generated_tokens=generated_tokens,
            generator_busy_s=busy_s,
            generator_idle_s=idle_s,
            completed_evaluations=completed,
            slowest=self.roster.slowest,
            exhausted=self.draws.exhausted,
        )

    # ---- time

    def tick(self, now: float) -> list[str]:
        """Takes back what is overdue. Returns a line for every generator dropped or no longer routed."""
        deadline = self.next_deadline()
        return [] if deadline is None or now < deadline else self._enforce(now)

    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the earliest."""
        deadlines = self.roster.next_deadline(), self._leases.next_deadline()
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _enforce(self, now: float) -> list[str]:
        deadlines, lines = self._config.deadlines, []
        with self._ledger.transaction():
            for name in self.roster.silent(now):
                silent = f"silent for {now - self.roster.members[name].seen_s:g} s"
                self._drop(name, silent, now, blame=True)
                lines.append(f"{name}: {silent}; its groups go to others")
            for name in self.roster.late(now):
                self.roster.unroute(name, now)
                reason = f"did not apply version {self.roster.published} in {deadlines.publish_s:g} s"
                self._ledger.event("unrouted", version=self.roster.published, generator=name, detail=reason)
                lines.append(f"{name}: {reason}; it gets no groups until it does")
            self.tickets.settle(self.roster.applied_by_all)
            for task in self._leases.overdue(now):
                self._give_back(task, f"not finished in {deadlines.group_s:g} s", now, blame=True)
        return lines

    # ---- leases

    def _next_task(self, surveys_only: bool) -> Task | None:
        """What to lease next: evaluation and training take turns, unless the learner waits for an evaluation."""
        self._survey_turn = not self._survey_turn
        if surveys_only:
            return self.surveys.next_task()
        if self._survey_turn:
            return self.surveys.next_task() or self._next_training()
        return self._next_training() or self.surveys.next_task()

    @property
    def _is_over(self) -> bool:
        """Whether nothing more will be taken, unless a resume has more steps."""
        return self.version >= self._config.run.steps

    def _next_training(self) -> Task | None:
        return None if self._is_over else self.draws.next(self.version, self._leases.num_training > 0)

    def _grant(self, task: Task, generator: str, version: int, now: float) -> Lease:
        task.attempt += 1
        task.generator, task.version, task.leased_s = generator, version, now
        if task.kind == "train":
            task.sampling, task.num_samples = self._training(version)
        self._leases.add(task)
        lease = task.lease(self._config.run.seed)
        if task.kind == "train":
            place = task.prompt.domain, task.prompt.index
            self._note(Granted(task.group_id, task.attempt, *place, task.version, generator))
            self._ledger.leased(lease, generator)
        return lease

    def _training(self, version: int) -> tuple[Sampling, int]:
        """How a group leased at `version` is sampled, and how often: by the schedule's entry that will judge it."""
        sampling, num_samples = samplings(self._schedule.at(version))["train"]
        if self._temperature is not None:
            sampling = msgspec.structs.replace(sampling, temperature=self._temperature)
        return sampling, num_samples

    def _drop(self, generator: str, reason: str, now: float, blame: bool) -> None:
        for task in self._leases.held_by(generator):
            self._give_back(task, reason, now, blame)
        self.roster.leave(generator, now)
        self.tickets.settle(self.roster.applied_by_all)
        self._ledger.event("left", generator=generator, detail=reason)

    def _give_back(self, task: Task, reason: str, now: float, blame: bool) -> None:
        """The lease is over without a result. With `blame` that may be the group's own fault, and so is not repeated
        for ever."""
        self._leases.end(task)
        task.failures += blame
        given_up = task.failures >= MAX_FAILURES
        if task.kind != "train":
            self.surveys.give_up(task, now) if given_up else self.surveys.give_back(task)
            return
        self._note(Lapsed(task.group_id, task.attempt, reason, given_up))
        self._ledger.returned(task.group_id, task.failures, task.generator, reason)
        if given_up:
            self._end(task.group_id, task.prompt.domain, "failed", f"{task.failures} attempts; the last: {reason}")
        else:
            self.draws.put_back(task)

    # ---- results

    def _refusal(self, group: Group, task: Task | None) -> str:
        """Why a result is not of a present lease; empty where it is."""
        if group.incarnation != self.incarnation:
            return f"incarnation {group.incarnation} is over"
        if task is None:
            return "no longer leased"
        return "" if group.attempt == task.attempt else f"attempt {task.attempt} took its place"

    def _accept(self, group: Group, task: Task, now: float) -> None:
        self._leases.end(task)
        if group.kind != "train":
            self.surveys.add(task, group, now)
            return
        self._ledger.arrived(group)
        self.draws.arrived(group, task.prompt)
        filters = self._schedule.at(group.lease_version).algorithm.filter_uniform
        end, reason = early_end(group, self._shape if filters else None)
        if end is None:
            self._failing.clear()
            self.buffer.admit(Waiting(group, now, self.version))
        else:
            self._end(group.group_id, group.domain, end, reason)

    def _end(self, group_id: int, domain: str, end: End, reason: str) -> None:
        """A group ends before any take."""
        self.tickets.release(group_id)
        self._record_end(group_id, domain, end, reason)
        if end == "filtered":
            self._filtered.append(group_id)
            self._failing.clear()
        elif end == "failed":
            self._failing.append(reason)

    def _record_end(self, group_id: int, domain: str, end: End, reason: str) -> None:
        self.draws.tally.end(domain, end)
        self._ends[end] += 1
        self._ledger.ended(group_id, end, reason)

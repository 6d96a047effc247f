"""The generators that take part: which version each applied, how much each asks for, which fell silent.

A member is routed, that is, gets leases and holds tickets back, from its first applied version on, until it leaves
or fails to apply a newer version in time.
"""

import heapq

import msgspec

from engine.config import Deadlines
from engine.schema import Applied


class Member(msgspec.Struct):
    """One generator. Times are on the coordinator's clock."""

    seen_s: float
    applied: int = -1
    routed: bool = False
    num_wanted: int = 0  # samples; a group is granted while it is above 0
    behind_s: float | None = None  # since when it owes us a newer version
    beat_s: float = -1.0  # its last heartbeat
    generated_tokens: int = 0
    busy_s: float = 0.0
    idle_s: float = 0.0
    newest: Applied | None = None  # what it said of the newest version


class Line:
    """Members at one `version`, who asks for most first; among equals, who joined first. Valid until something besides
    `grant` changes them."""

    def __init__(self, version: int, members: dict[str, Member]):
        self.version = version
        self._members = members
        self._heap = [
            (-member.num_wanted, place, name)
            for place, (name, member) in enumerate(members.items())
            if member.num_wanted > 0
        ]
        heapq.heapify(self._heap)

    @property
    def first(self) -> str | None:
        return self._heap[0][2] if self._heap else None

    def grant(self, num_samples: int) -> None:
        """The first is given so many, and waits for the rest of what it asks for."""
        _, place, name = heapq.heappop(self._heap)
        member = self._members[name]
        member.num_wanted -= num_samples
        if member.num_wanted > 0:
            heapq.heappush(self._heap, (-member.num_wanted, place, name))


class Roster:
    """The members by name, and the newest `published` version."""

    def __init__(self, deadlines: Deadlines):
        self.members: dict[str, Member] = {}
        self.published = -1
        self.generated_tokens = 0  # of members that left; likewise the times
        self.busy_s = 0.0
        self.idle_s = 0.0
        self._deadlines = deadlines
        self._unrouted_s: float | None = None  # since when no member has been routed

    def join(self, name: str, now: float) -> None:
        self.members[name] = Member(seen_s=now)

    def leave(self, name: str, now: float) -> None:
        member = self.members.pop(name)
        self._note_routing(now)
        self.generated_tokens += member.generated_tokens
        self.busy_s += member.busy_s
        self.idle_s += member.idle_s

    def totals(self) -> tuple[int, float, float]:
        """Tokens generated, seconds busy and seconds idle of all members that ever were."""
        members = self.members.values()
        return (
            self.generated_tokens + sum(member.generated_tokens for member in members),
            self.busy_s + sum(member.busy_s for member in members),
            self.idle_s + sum(member.idle_s for member in members),
        )

    @property
    def slowest(self) -> Applied | None:
        """Of what the routed members said of their newest versions, what took longest to stage."""
        said = [member.newest for member in self.members.values() if member.routed and member.newest is not None]
        return max(said, key=lambda applied: applied.stage_s, default=None)

    # ---- versions

    @property
    def newest_applied(self) -> int:
        """The newest version that a routed member samples with; -1 without any."""
        return max((member.applied for member in self.members.values() if member.routed), default=-1)

    @property
    def applied_by_all(self) -> int:
        """The newest version that every routed member has reached; -1 without any."""
        return min((member.applied for member in self.members.values() if member.routed), default=-1)

    def publish(self, version: int, now: float) -> None:
        """Supersedes a version not yet applied; what is owed is owed since the first one missed. A member that found
        the weights before we heard of them owes nothing."""
        self.published = version
        for member in self.members.values():
            if member.routed and member.applied < version and member.behind_s is None:
                member.behind_s = now
        self._note_routing(now)

    def apply(self, name: str, message: Applied, settled: int, now: float) -> None:
        """A member changed its version. It is routed unless the tickets of a newer one returned already."""
        member, version = self.members[name], message.version
        member.applied, member.newest = version, message
        member.routed = version >= settled
        member.behind_s = now if member.routed and version < self.published else None
        self._note_routing(now)

    def unroute(self, name: str, now: float) -> None:
        """A member gets no leases until it applies a newer version."""
        self.members[name].routed = False
        self._note_routing(now)

    def _note_routing(self, now: float) -> None:
        if any(member.routed for member in self.members.values()):
            self._unrouted_s = None
        elif self._unrouted_s is None:
            self._unrouted_s = now

    # ---- whom to give the next lease

    def line(self, pinned: bool) -> "Line":
        """The members that ask, among those at the newest applied version; with `pinned` that must be the newest
        published one."""
        version = self.published if pinned else self.newest_applied
        ready = {name: member for name, member in self.members.items() if member.routed and member.applied == version}
        return Line(version, ready)

    # ---- deadlines

    def stalled(self, now: float) -> str:
        """Why no generator has sampled for `publish_s`; empty where one does, or may yet."""
        if self._unrouted_s is None or now - self._unrouted_s < self._deadlines.publish_s:
            return ""
        if not self.members:
            return "no generator is a member of the job: see their logs"
        states = [
            f"{name} {'loads its model' if member.applied < 0 else f'samples with version {member.applied}'}"
            for name, member in sorted(self.members.items())
        ]
        return f"no generator has applied version {self.published}: {', '.join(states)}; see their logs"

    def silent(self, now: float) -> list[str]:
        return [name for name, member in self.members.items() if now >= self._silent_at(member)]

    def _silent_at(self, member: Member) -> float:
        """A member that still loads its model says nothing meanwhile, and has until `start_s`."""
        limit = self._deadlines.lease_s if member.applied >= 0 else self._deadlines.start_s
        return member.seen_s + max(limit, self._deadlines.lease_s)

    def late(self, now: float) -> list[str]:
        """Routed members that owe a version for too long."""
        limit = self._deadlines.publish_s
        return [
            name
            for name, member in self.members.items()
            if member.routed and member.behind_s is not None and now - member.behind_s >= limit
        ]

    def next_deadline(self) -> float | None:
        silent = [self._silent_at(member) for member in self.members.values()]
        late = [
            member.behind_s + self._deadlines.publish_s
            for member in self.members.values()
            if member.routed and member.behind_s is not None
        ]
        return min(silent + late, default=None)

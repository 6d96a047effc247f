"""Finished groups that wait for the learner, and the rule by which it takes them.

A group's deadline is the last learner version at which its oldest token is within bounds: the version of its first
token (while it is still generated: of its lease) + max_staleness. The take at `version` chooses the groups with the
earliest deadlines, oldest ticket first among equals, and stands only if all others can still be in time: for every
d >= version, at most (d - version) * groups_per_step groups with a deadline <= d are left, generated or not.
Otherwise the learner waits for a straggler. Earliest deadline first is optimal: where it does not stand, no
choice does.
"""

from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from engine.schema import End, Group

Shape = Callable[[Group], np.ndarray]  # group -> penalised scores, float64 [num_samples]


class Waiting(msgspec.Struct, frozen=True):
    """A group in the buffer; `arrived_s` on the coordinator's clock, `arrival_version` the learner's at that time."""

    group: Group
    arrived_s: float
    arrival_version: int

    @property
    def newest_version(self) -> int:
        versions = self.group.versions
        return int(versions.max()) if len(versions) else self.group.lease_version


class Buffer:
    """The finished, untaken groups by id; an id is the ticket's order, since groups are drawn one by one."""

    def __init__(self, max_staleness: int):
        self.max_staleness = max_staleness
        self._deadlines: dict[int, int] = {}
        self._waiting: dict[int, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def waiting(self) -> list[Waiting]:
        return list(self._waiting.values())

    def admit(self, waiting: Waiting) -> None:
        group_id = waiting.group.group_id
        self._waiting[group_id] = waiting
        self._deadlines[group_id] = waiting.group.first_version + self.max_staleness

    def expire(self, version: int) -> list[Waiting]:
        """Removes the groups of which every token is too old to be trained at `version`."""
        overdue = [group_id for group_id, deadline in self._deadlines.items() if deadline < version]
        newest = {group_id: self._waiting[group_id].newest_version for group_id in overdue}
        return [self._remove(group_id) for group_id in overdue if newest[group_id] + self.max_staleness < version]

    def take(self, num_groups: int, version: int, leased_versions: Iterable[int]) -> list[Waiting] | None:
        """The groups to train at `version`, oldest ticket first, or None where the learner must wait.

        `leased_versions` are the lease versions of the groups still being generated.
        """
        if len(self._waiting) < num_groups:
            return None
        order = sorted(self._deadlines, key=lambda group_id: (self._deadlines[group_id], group_id))
        left = [self._deadlines[group_id] for group_id in order[num_groups:]]
        left += [leased + self.max_staleness for leased in leased_versions]
        if not in_time(left, version, num_groups):
            return None
        return [self._remove(group_id) for group_id in sorted(order[:num_groups])]

    def _remove(self, group_id: int) -> Waiting:
        del self._deadlines[group_id]
        return self._waiting.pop(group_id)


def in_time(deadlines: list[int], version: int, groups_per_step: int) -> bool:
    """Whether the takes after `version` can meet all `deadlines`: the i-th earliest (from 0) is taken at
    version + 1 + i // groups_per_step."""
    return all(version + 1 + place // groups_per_step <= deadline for place, deadline in enumerate(sorted(deadlines)))


def early_end(group: Group, shape: Shape | None) -> tuple[End | None, str]:
    """The end of a group that need not enter the buffer, and the reason: too few valid completions; or, with `shape`,
    penalised scores that are all equal, so that a comparison within the group teaches nothing."""
    valid = [not verdict.error for verdict in group.verdicts]
    if sum(valid) < min(2, group.num_samples):
        first = next(verdict.error for verdict in group.verdicts if verdict.error)
        return "failed", f"{sum(valid)} valid completions of {group.num_samples}: {first}"
    if shape is None or group.num_samples == 1:
        return None, ""
    scores = shape(group)[valid]
    return ("filtered", f"all scores {scores[0]:g}") if scores.min() == scores.max() else (None, "")

"""Staleness admission: a group needs a ticket to be generated, and there are only so many.

`(max_staleness + 1) * groups_per_step` tickets exist. A group holds one from its draw until the weights that it
helped to make are applied by every routed generator, or until it ends without having been trained. So at learner
version v and newest applied version a, the takes a..v-1 hold (v - a) * groups_per_step tickets, the untaken groups at
most (max_staleness + 1 - (v - a)) * groups_per_step, and a group leased now, at a, is among the next that many:
it is taken at a + max_staleness at the latest.
"""

from collections import defaultdict
from collections.abc import Iterable


class Tickets:
    """Who holds the tickets. `settled` is the newest version that every routed generator is known to have applied."""

    def __init__(self, max_staleness: int, groups_per_step: int):
        self.capacity = (max_staleness + 1) * groups_per_step
        self.settled = -1
        self._untaken: set[int] = set()
        self._taken: defaultdict[int, set[int]] = defaultdict(set)  # version in the making -> groups

    @property
    def num_held(self) -> int:
        return len(self._untaken) + sum(map(len, self._taken.values()))

    @property
    def num_free(self) -> int:
        return self.capacity - self.num_held

    def acquire(self, group_id: int) -> None:
        """Gives a free ticket to a group."""
        assert self.num_free > 0, "a ticket beyond the capacity"
        assert group_id not in self._untaken, f"group {group_id} holds a ticket already"
        self._untaken.add(group_id)

    def release(self, group_id: int) -> None:
        """The group ended before any take: its ticket returns at once."""
        self._untaken.remove(group_id)

    def hold(self, group_ids: Iterable[int], version: int) -> None:
        """The groups became `version`: their tickets return when it is settled. That holds for a skipped update too,
        as its take moved the learner one version on."""
        group_ids = set(group_ids)
        assert group_ids <= self._untaken, f"groups {sorted(group_ids - self._untaken)} hold no ticket"
        self._untaken -= group_ids
        if version > self.settled:
            self._taken[version] |= group_ids

    def settle(self, version: int) -> None:
        """Every routed generator applied `version`: what helped to make it, or an older one, returns."""
        self.settled = max(self.settled, version)
        for made in [made for made in self._taken if made <= self.settled]:
            del self._taken[made]

"""The leases that are out."""

import itertools

from engine.schema import Kind
from engine.task import Task


class Leases:
    """Groups that generators hold, in the order of their leases; each may be held for `group_s` seconds."""

    def __init__(self, group_s: float):
        self.num_training = 0
        self._group_s = group_s
        self._tasks: dict[tuple[Kind, int], Task] = {}

    def add(self, task: Task) -> None:
        self._tasks[task.key] = task
        self.num_training += task.kind == "train"

    def end(self, task: Task) -> None:
        del self._tasks[task.key]
        self.num_training -= task.kind == "train"

    def find(self, kind: Kind, group_id: int) -> Task | None:
        return self._tasks.get((kind, group_id))

    def held_by(self, generator: str) -> list[Task]:
        return [task for task in self._tasks.values() if task.generator == generator]

    def training(self) -> list[Task]:
        return [task for task in self._tasks.values() if task.kind == "train"]

    def overdue(self, now: float) -> list[Task]:
        return list(itertools.takewhile(lambda task: now - task.leased_s >= self._group_s, self._tasks.values()))

    def next_deadline(self) -> float | None:
        return next((task.leased_s + self._group_s for task in self._tasks.values()), None)

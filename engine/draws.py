"""The training groups to come: drawn anew where a ticket is free, or once more after their lease was lost."""

import heapq
from collections.abc import Container
from typing import Any, Protocol

from engine.config import Config
from engine.schema import Group, Prompt
from engine.tally import Exhausted, PassRate, Tally, count, digest
from engine.task import Task
from engine.tickets import Tickets

MIN_PROBES = 4  # prompts of the parity check


class Prompts(Protocol):
    """The prompt cursor, as far as it is needed here."""

    def draw(self, tally: Tally, left_out: Container[str]) -> tuple[str, int]: ...
    def is_wanted(self, name: str, index: int, tally: Tally) -> bool: ...
    def comes_again(self, domain: str) -> bool: ...
    def prompt(self, domain: str, index: int) -> Prompt: ...
    def held_out(self) -> list[Prompt]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Draws:
    """Which group is leased next, and what became of those before as far as the next draws depend on it.

    A domain of which the curriculum leaves out every prompt is passed over until a result brings one back; the others
    go on. Where that holds of all domains, there is nothing more to draw.
    """

    def __init__(self, config: Config, prompts: Prompts, tickets: Tickets):
        self.tally = Tally()
        self.num_drawn = 0
        self._config, self._prompts, self._tickets = config, prompts, tickets
        self._domains = [domain.name for domain in config.domains]
        self._pending: list[tuple[int, Task]] = []  # heap, oldest ticket first
        self._exhausted: dict[str, str] = {}  # the reason by domain
        self._round = 0  # leases that the present round may still grant, at max_staleness 0

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def exhausted(self) -> list[str]:
        """The domains of which no prompt is left for now."""
        return list(self._exhausted)

    @property
    def end(self) -> str:
        """Why there is nothing more to draw; empty while there is."""
        return "; ".join(self._exhausted.values()) if len(self._exhausted) == len(self._domains) else ""

    def recount(self, rows: list[dict[str, Any]]) -> None:
        """Begins from what the ledger's `rows` tell, one a group."""
        self.tally = count(rows, self._config.curriculum.rates)
        for row in rows:
            if self._prompts.comes_again(row["domain"]):
                prompt = self._prompts.prompt(row["domain"], row["prompt_index"])
                self.tally.judged(rate(prompt, row["solved"], row["judged"]))

    def resume(self, row: dict[str, Any]) -> None:
        """A group that the checkpoint holds in flight, a row of the ledger, keeps its ticket."""
        self._tickets.acquire(row["group_id"])
        if row["state"] == "pending":
            prompt = self._prompts.prompt(row["domain"], row["prompt_index"])
            self.put_back(Task("train", row["group_id"], prompt, attempt=row["attempt"], failures=row["failures"]))

    def put_back(self, task: Task) -> None:
        """Its lease is over without a result: it needs another."""
        heapq.heappush(self._pending, (task.group_id, task))

    def next(self, version: int, is_under_way: bool) -> Task | None:
        """What to lease next, with the learner at `version`. `is_under_way` says whether any lease of training is out.

        At max_staleness 0 groups are leased in rounds: the next begins when every result of the last is in. So which
        groups are sampled together depends on no result's time of arrival.
        """
        if self._config.run.max_staleness > 0:
            return self._next(version)
        if self._round == 0 and not is_under_way:
            self._round = self._tickets.num_free + len(self._pending)
        if self._round == 0:
            return None
        self._round -= 1
        return self._next(version)

    def _next(self, version: int) -> Task | None:
        if self._pending:
            return heapq.heappop(self._pending)[1]
        run = self._config.run
        enough = self.tally.suffices((run.steps - version) * run.groups_per_step)
        place = None if self._tickets.num_free == 0 or enough else self._draw()
        if place is None:
            return None
        task = Task("train", self.num_drawn, self._prompts.prompt(*place))
        self.tally.drawn(task.prompt.domain)
        self._tickets.acquire(task.group_id)
        self.num_drawn += 1
        return task

    def _draw(self) -> tuple[str, int] | None:
        while not self.end:
            try:
                return self._prompts.draw(self.tally, self._exhausted)
            except Exhausted as error:
                self._exhausted[error.domain] = str(error)
        return None

    def arrived(self, group: Group, prompt: Prompt) -> None:
        """The result of a group of `prompt`."""
        self.tally.arrived(group.domain, group.num_samples)
        if not self._prompts.comes_again(prompt.domain):
            return
        valid = [verdict for verdict in group.verdicts if not verdict.error]
        self.tally.judged(rate(prompt, sum(verdict.solved for verdict in valid), len(valid)))
        if prompt.domain in self._exhausted and self._prompts.is_wanted(prompt.domain, prompt.index, self.tally):
            del self._exhausted[prompt.domain]

    def probes(self) -> list[Prompt]:
        """Training prompts of every domain for the parity check; the cursor stays where it is."""
        num_rounds = -(-MIN_PROBES // len(self._domains))
        return [self._prompts.prompt(name, index) for index in range(num_rounds) for name in self._domains]


def rate(prompt: Prompt, solved: int, judged: int) -> PassRate:
    return PassRate(prompt.domain, digest(prompt.text), prompt.index, solved, judged)

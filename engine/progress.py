"""What the user sees while a job runs: a live table on a terminal, one line every few seconds elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

LINE_EVERY_S = 10.0


class Progress:
    """The job's face. `phase` says what goes on now, `step` shows the figures of the last step."""

    def __init__(self, name: str, num_steps: int, *, live: bool):
        self._console = Console()
        self._name, self._num_steps = name, num_steps
        self._record: dict[str, Any] = {}
        self._accuracy = ""
        self._phase = ""
        self._started = self._printed = time.monotonic()
        self._first_step = 0
        self._live = Live(console=self._console, refresh_per_second=4) if live and self._console.is_terminal else None
        if self._live:
            self._live.start()

    def phase(self, text: str) -> None:
        self._phase = text
        if self._live:
            self._live.update(self._table())
        else:
            self._console.print(f"leeway: {text}", highlight=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False)

    def accuracy(self, text: str) -> None:
        self._accuracy = text
        self.say(text)

    def begin(self, step: int) -> None:
        """The steps start at `step`."""
        self._first_step, self._started = step, time.monotonic()
        self._phase = "training"

    def step(self, record: dict[str, Any]) -> None:
        self._record = record
        now = time.monotonic()
        if self._live:
            self._live.update(self._table())
        elif now - self._printed > LINE_EVERY_S or record["step"] == self._num_steps:
            self._printed = now
            self._console.print(line(record, self._num_steps), highlight=False)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _left_s(self) -> float:
        done = self._record.get("step", 0) - self._first_step
        spent = time.monotonic() - self._started
        return spent / done * (self._num_steps - self._record["step"]) if done > 0 else 0.0

    def _table(self) -> Table:
        record = self._record
        table = Table(title=f"{self._name}: {self._phase}", show_header=False, box=None, title_justify="left")
        step = record.get("step", 0)
        table.add_row("step", ProgressBar(self._num_steps, step, width=40), f"{step}/{self._num_steps}")
        if record:
            table.add_row("reward", f"{record['reward']:.3f}", f"accuracy {record['accuracy']:.1%}")
            table.add_row(
                "staleness",
                f"{record['staleness']:.2f} mean, {record['staleness_max']} max",
                f"in flight {record['staleness_in_flight']:.2f}, in queue {record['staleness_in_queue']:.2f}",
            )
            table.add_row(
                "tokens/s",
                f"generated {record['generated_tokens_per_s']:,.0f}",
                f"trained {record['trained_tokens_per_s']:,.0f}",
            )
            table.add_row(
                "idle", f"generators {record['generator_idle']:.0%}", f"learner {record['learner_idle']:.0%}"
            )
            table.add_row("bottleneck", record["bottleneck"], f"{self._left_s():.0f} s left")
        if self._accuracy:
            table.add_row("evaluation", self._accuracy, "")
        return table


def line(record: dict[str, Any], num_steps: int) -> str:
    """One step in one line."""
    return (
        f"step {record['step']}/{num_steps}  reward {record['reward']:.3f}  accuracy {record['accuracy']:.1%}  "
        f"staleness {record['staleness']:.2f} (max {record['staleness_max']})  "
        f"tokens/s {record['generated_tokens_per_s']:,.0f} generated, {record['trained_tokens_per_s']:,.0f} trained  "
        f"idle {record['generator_idle']:.0%} generators, {record['learner_idle']:.0%} learner"
    )

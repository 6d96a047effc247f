"""What the user sees while a job runs: a live table on a terminal, one line every few seconds elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

LINE_EVERY_S = 10.0
POLICY = ("entropy", "drift", "grad_norm")  # figures of the policy, where a step has them
TROUBLES = {  # figures that are worth a word where they are not 0
    "num_invalid": "completions beyond judgement",
    "num_stale_tokens": "tokens too old to train on",
    "skipped_updates": "updates skipped, not finite",
}


class Progress:
    """The job's face: `phase` says what goes on now, `step` shows the figures of the last step, `say` a line that
    stays. `console` is standard output by default; `clock` counts seconds."""

    def __init__(
        self,
        name: str,
        num_steps: int,
        *,
        live: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = Console() if console is None else console
        self._clock = clock
        self._name, self._num_steps = name, num_steps
        self._phase = self._accuracy = ""
        self._record: dict[str, Any] = {}
        self._first_step = 0
        self._started_s = clock()
        self._next_line_s = self._started_s
        drawn = live and self._console.is_terminal and not self._console.is_dumb_terminal  # where `Live` shows nothing
        self._live = Live(console=self._console, refresh_per_second=4) if drawn else None
        if self._live:
            self._live.start()

    def phase(self, text: str) -> None:
        self._phase = text
        if self._live:
            self._live.update(self.table())
        else:
            self.say(f"leeway: {text}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def accuracy(self, text: str) -> None:
        """The newest evaluation."""
        self._accuracy = text
        self.say(text)

    def begin(self, step: int) -> None:
        """The steps after `step` start now."""
        self._first_step, self._started_s = step, self._clock()
        self._next_line_s = self._started_s
        self._phase = "training"

    def step(self, record: dict[str, Any]) -> None:
        """The last step as a row of kind `step`, see `engine.metrics`."""
        self._record = record
        if self._live:
            self._live.update(self.table())
        elif self._clock() >= self._next_line_s or record["step"] == self._num_steps:
            self._next_line_s = self._clock() + LINE_EVERY_S
            self.say("  ".join([f"step {record['step']}/{self._num_steps}", *self.figures().values()]))

    def close(self) -> None:
        """Safe to call twice."""
        if self._live:
            self._live.stop()
            self._live = None

    def table(self) -> Table:
        """The whole as the live display shows it."""
        step = self._record.get("step", self._first_step)
        table = Table(title=f"{self._name}: {self._phase}", show_header=False, box=None, title_justify="left")
        table.add_column(style="dim")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(self._num_steps, step, width=40), f"{step}/{self._num_steps}")
        table.add_row("step", bar)
        if self._record:
            for name, text in self.figures().items():
                table.add_row(name, text.removeprefix(f"{name} "))
            table.add_row("bottleneck", self._record["bottleneck"])
        if self._accuracy:
            table.add_row("held out", self._accuracy)
        return table

    def figures(self) -> dict[str, str]:
        """The last step's figures in words, by what they are of."""
        row = self._record
        policy = [f"{name.replace('_', ' ')} {row[name]:.2g}" for name in POLICY if name in row]
        troubles = [f"{row[name]:,} {what}" for name, what in TROUBLES.items() if row.get(name)]
        figures = {
            "reward": f"reward {row['reward']:.3f}",
            "accuracy": f"accuracy {row['accuracy']:.1%}",
            "length": f"length {row['length']:,.0f} ({row['truncated']:.0%} cut off)",
            "policy": f"policy {', '.join(policy)}" if policy else "",
            "staleness": f"staleness {row['staleness']:.2f} (in flight {row['staleness_in_flight']:.2f}, in queue "
            f"{row['staleness_in_queue']:.2f}, max {row['staleness_max']})",
            "tokens/s": f"tokens/s {row['generated_tokens_per_s']:,.0f} generated, "
            f"{row['trained_tokens_per_s']:,.0f} trained",
            "idle": f"idle {row['generator_idle']:.0%} generators, {row['learner_idle']:.0%} learner",
            "left": f"left {duration(self._left_s())}",
            "trouble": f"trouble {', '.join(troubles)}" if troubles else "",
        }
        return {name: text for name, text in figures.items() if text}

    def _left_s(self) -> float:
        """Seconds that the steps to come take at the pace of those since `begin`."""
        done = self._record["step"] - self._first_step
        return (self._clock() - self._started_s) / done * (self._num_steps - self._record["step"])


def duration(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{round(seconds)} s"

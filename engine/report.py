"""python -m engine.report RUN [--out DIR]: what any run, past or going on, has to tell."""

import argparse
import contextlib
import json
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.curves import PHASES, Row, domains, draw, other_s
from engine.metrics import bottleneck
from engine.run_directory import RunDirectory
from engine.summary import records

NUM_SLOWEST = 3  # steps shown
NUM_ERRORS = 5  # likewise, the most frequent ones
WIDTH = 110  # where the output is no terminal

ENDS = "SELECT state, coalesce(reason, ''), count(*) FROM groups GROUP BY 1, 2 ORDER BY 3 DESC"
ERRORS = """
SELECT domain, error, count(*) FROM completions JOIN groups USING (group_id) WHERE error != ''
GROUP BY 1, 2 ORDER BY 3 DESC LIMIT ?
"""
UPDATES = """
SELECT count(*), avg(json_extract(detail, '$.stage_s')), avg(json_extract(detail, '$.pause_s')),
       max(json_extract(detail, '$.pause_s')) FROM events WHERE event = 'applied'
"""
STAGES = {
    "sampled and scored": "arrived - leased",
    "waiting to be taken": "taken - arrived",
    "trained": "ended - taken",
}


# ---- tables --------------------------------------------------------------------------------------------------------


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def groups_by_end(ledger: sqlite3.Connection) -> Table:
    return table("Groups by end", ("end or state", "reason", "groups"), ledger.execute(ENDS))


def beyond_judgement(ledger: sqlite3.Connection) -> Table:
    """Why completions got no verdict."""
    rows = ledger.execute(ERRORS, (NUM_ERRORS,)).fetchall()
    return table("Completions beyond judgement", ("domain", "error", "completions"), rows)


def groups_by_stage(ledger: sqlite3.Connection) -> Table:
    """How long groups took over each stage of their life."""
    rows = []
    for name, span in STAGES.items():
        query = f"SELECT count(*), avg({span}), max({span}) FROM groups WHERE {span} IS NOT NULL"
        count, mean_s, longest_s = ledger.execute(query).fetchone()
        if count:
            rows.append((name, count, f"{mean_s:.2f}", f"{longest_s:.2f}"))
    return table("A group's life", ("stage", "groups", "mean s", "longest s"), rows)


def weight_updates(ledger: sqlite3.Connection) -> Table:
    """What new weights cost the generators: copied and verified while they sample, applied while they stand still."""
    count, stage_s, pause_s, longest_s = ledger.execute(UPDATES).fetchone()
    rows = [(count, *(f"{seconds:.3f}" for seconds in (stage_s, pause_s, longest_s)))] if count else []
    return table("Weights at the generators", ("versions applied", "stage s", "pause s", "longest pause s"), rows)


def evaluated(evaluations: list[Row]) -> Table:
    names = domains(evaluations)
    rows = []
    for row in evaluations:
        first, last = row["first_version"], row["last_version"]
        scores = [f"{percent(row.get(f'accuracy/{each}'))} ± {percent(row.get(f'stderr/{each}'))}" for each in names]
        rows.append((row["name"], first if first == last else f"{first} to {last}", *scores))
    return table("Held-out accuracy, avg@k ± one standard error", ("evaluation", "versions", *names), rows)


def learner_time(steps: list[Row]) -> Table:
    """Where the learner's time went, longest first."""
    whole_s = sum(row["step_s"] for row in steps)
    spent: dict[str, float] = {name: sum(row[key] for row in steps) for key, name in PHASES.items() if key != "other_s"}
    spent["checkpoints, metrics"] = sum(other_s(row) for row in steps)
    longest = sorted(spent.items(), key=lambda item: -item[1])
    rows = [(name, f"{seconds:.1f}", percent(seconds / whole_s if whole_s else None)) for name, seconds in longest]
    return table(f"The learner's {whole_s:.0f} s", ("phase", "seconds", "share"), rows)


def slowest_steps(steps: list[Row]) -> Table:
    slowest = sorted(steps, key=lambda row: -row["step_s"])[:NUM_SLOWEST]
    rows = [
        (row["step"], *(f"{row[key]:.2f}" for key in ("step_s", "wait_s", "train_s", "publish_s"))) for row in slowest
    ]
    return table("Slowest steps, seconds", ("step", "whole", "waiting", "training", "publishing"), rows)


def flat(summary: Row, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of every figure in a nested summary."""
    rows: list[tuple[str, str]] = []
    for name, value in summary.items():
        dotted = prefix + name
        if isinstance(value, dict):
            rows += flat(value, f"{dotted}.")
        elif dotted.startswith(("accuracy", "domains.")) or name.endswith("_idle"):
            rows.append((dotted, percent(value)))
        else:
            rows.append((dotted, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"))
    return rows


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def verdict(steps: list[Row]) -> str:
    """The bottleneck of the run as a whole."""
    whole_s = sum(row["step_s"] for row in steps) or 1.0
    learner_idle = sum(row["wait_s"] for row in steps) / whole_s
    generator_idle = sum(row["generator_idle"] * row["step_s"] for row in steps) / whole_s
    shares = f"learner {percent(learner_idle)}, generators {percent(generator_idle)}"
    return f"idle: {shares}: {bottleneck(learner_idle, generator_idle)}"


# ---- the command ---------------------------------------------------------------------------------------------------


def report(run: RunDirectory, out: Path, console: Console) -> None:
    """Prints the tables of `run` and draws its curves in `out`. Raises `sqlite3.DatabaseError` for a broken ledger."""
    rows = records(run.metrics)
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    with contextlib.closing(sqlite3.connect(f"{run.ledger.as_uri()}?mode=ro", uri=True)) as ledger:
        console.print(groups_by_end(ledger), groups_by_stage(ledger), weight_updates(ledger))
        errors = beyond_judgement(ledger)
    if errors.rows:
        console.print(errors)
    if evaluations:
        console.print(evaluated(evaluations))
    if steps:
        console.print(learner_time(steps), slowest_steps(steps), verdict(steps))
        out.mkdir(parents=True, exist_ok=True)
        draw(steps, evaluations, run.name, out / "curves.png")
    if run.summary.exists():
        summary = json.loads(run.summary.read_text())
        console.print(table("Summary", ("figure", "value"), flat(summary)))
    console.print(f"curves: {out / 'curves.png'}" if steps else "no step was finished yet", soft_wrap=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="where curves.png goes; default: RUN/report")
    arguments = parser.parse_args(argv)
    run = RunDirectory(arguments.run)
    missing = [path.name for path in (run.metrics, run.ledger) if not path.exists()]
    if missing:
        print(f"leeway: {arguments.run}: no run directory (it has no {' and no '.join(missing)})", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    try:
        report(run, arguments.out or run.path / "report", console)
    except (sqlite3.DatabaseError, OSError) as error:
        print(f"leeway: {arguments.run}: cannot be read: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

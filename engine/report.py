"""python -m engine.report RUN [--out DIR]: what any run, past or going on, has to tell."""

import argparse
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.run_directory import RunDirectory

# One panel a row: title, the figures drawn in it, the label of its axis.
PANELS = (
    ("Reward and accuracy of rollouts", ("reward", "accuracy"), "mean"),
    ("Held-out accuracy (avg@k, one standard error)", (), "share solved"),
    ("Staleness of tokens", ("staleness", "staleness_in_flight", "staleness_in_queue", "staleness_max"), "versions"),
    ("Speed", ("generated_tokens_per_s", "trained_tokens_per_s"), "tokens/s"),
    ("Idle share", ("learner_idle", "generator_idle"), "share of time"),
    ("Effective sample size", ("effective_sample_size",), "share of tokens"),
    ("Behaviour and policy apart", ("drift", "kl", "clipped", "rejected"), "nats or share"),
    ("Length of completions", ("length", "length_max"), "tokens"),
)


def records(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a torn last line (the job was killed) is left out. A resume undoes the rows beyond
    its checkpoint: of two rows of one kind, name and step the later one counts."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in run.metrics.read_text().splitlines():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        latest[row["kind"], row.get("name"), row["step"]] = row
    return sorted(latest.values(), key=lambda row: row["step"])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves of a run as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    figure, axes = pyplot.subplots(len(PANELS) // 2, 2, figsize=(13, 3.2 * len(PANELS) / 2), layout="constrained")
    for axis, (title, names, label) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            present = [(row["step"], row[name]) for row in steps if name in row]
            if present:
                axis.plot(*zip(*present, strict=True), label=name.replace("_", " "), linewidth=1.2)
        if not names:
            _draw_evaluations(axis, evaluations)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("version")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_evaluations(axis: Any, evaluations: list[dict[str, Any]]) -> None:
    domains = sorted({key.partition("/")[2] for row in evaluations for key in row if key.startswith("accuracy/")})
    for domain in domains:
        points = [(row["last_version"], row[f"accuracy/{domain}"], row[f"stderr/{domain}"]) for row in evaluations]
        versions, values, errors = zip(*sorted(points), strict=True)
        axis.errorbar(versions, values, yerr=errors, label=domain, marker="o", markersize=3, linewidth=1.2, capsize=2)


def ends(run: RunDirectory) -> list[tuple[str, str, int]]:
    """(end, reason, number of groups) from the ledger."""
    with sqlite3.connect(f"file:{run.ledger}?mode=ro", uri=True) as ledger:
        return ledger.execute(
            "SELECT state, coalesce(reason, ''), count(*) FROM groups GROUP BY 1, 2 ORDER BY 3 DESC"
        ).fetchall()


def table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def phases(steps: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Where the learner's time went, longest first."""
    totals = {
        "waiting for groups": sum(row["wait_s"] for row in steps),
        "training": sum(row["train_s"] for row in steps),
        "publishing weights": sum(row["publish_s"] for row in steps),
    }
    whole = sum(row["step_s"] for row in steps)
    totals["checkpoints, evaluation, metrics"] = max(0.0, whole - sum(totals.values()))
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [(name, f"{seconds:.1f}", f"{seconds / whole:.0%}" if whole else "") for name, seconds in ordered]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="where the PNG goes; default: RUN/report")
    arguments = parser.parse_args(argv)
    run = RunDirectory(arguments.run)
    if not run.metrics.exists() or not run.ledger.exists():
        print(f"leeway: {arguments.run}: no run directory (metrics.jsonl and ledger.db are needed)", file=sys.stderr)
        return 2
    console, rows = Console(), records(run)
    steps = [row for row in rows if row["kind"] == "step"]
    console.print(table("Groups by end", ("end", "reason", "groups"), ends(run)))
    for row in (row for row in rows if row["kind"] == "evaluation"):
        scores = [
            (name, f"{row[f'accuracy/{name}']:.1%}", f"{row[f'stderr/{name}']:.1%}", row[f"num_completions/{name}"])
            for name in sorted(key.partition("/")[2] for key in row if key.startswith("accuracy/"))
        ]
        span = f"versions {row['first_version']} to {row['last_version']}"
        columns = ("domain", "avg@k", "stderr", "completions")
        console.print(table(f"Evaluation {row['name']!r}, {span}", columns, scores))
    if steps:
        console.print(table("The learner's time", ("phase", "seconds", "share"), phases(steps)))
        console.print(f"bottleneck: {steps[-1]['bottleneck']}")
        out = arguments.out or run.path / "report"
        out.mkdir(parents=True, exist_ok=True)
        draw(rows, out / "curves.png")
        console.print(f"curves: {out / 'curves.png'}", soft_wrap=True)
    if run.summary.exists():
        summary = json.loads(run.summary.read_text())
        console.print(table("Summary", ("figure", "value"), [(k, v) for k, v in summary.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

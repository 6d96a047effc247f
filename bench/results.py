"""What every bench prints and keeps: rows of ours beside a reference, with commit and device."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"


def row(
    case: str, metric: str, ours: list[float], reference: list[float], reference_name: str, goal: float | None
) -> dict[str, Any]:
    """Medians of interleaved rounds; `ratio` is the median of the rounds' own ratios, above 1 where ours is better
    (metrics here are speeds: more is better). A goal is met where ratio >= goal."""
    ratios = [mine / theirs for mine, theirs in zip(ours, reference, strict=True)]
    return {
        "case": case,
        "metric": metric,
        "ours": median(ours),
        "reference": median(reference),
        "reference_name": reference_name,
        "ratio": median(ratios),
        "ratios": ratios,
        "goal": goal,
    }


def keep(bench: str, device: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Prints the table and writes `results/BENCH-DEVICE.json`."""
    table = Table(title=bench, title_justify="left")
    for column in ("case", "metric", "ours", "reference", "", "ratio", "goal"):
        table.add_column(column, justify="right" if column in ("ours", "reference", "ratio", "goal") else "left")
    for entry in rows:
        goal = "" if entry["goal"] is None else f"{entry['goal']:g}"
        ours, reference = f"{entry['ours']:,.4g}", f"{entry['reference']:,.4g}"
        table.add_row(
            entry["case"], entry["metric"], ours, reference, entry["reference_name"], f"{entry['ratio']:.2f}", goal
        )
    Console().print(table)
    path = Path(os.environ.get("OUT", RESULTS)) / f"{bench}-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "bench": bench,
        "commit": _commit(),
        "device": _device(device),
        "date": datetime.date.today().isoformat(),
        "torch": str(torch.__version__),
        **facts,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"kept in {path}")
    return path


def _commit() -> str:
    """`+` where code differs from it; results that a bench has just written do not count."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parents[1]).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"

"""python -m rewards.curate RECIPE.toml FILE.jsonl ... --out OUT.jsonl: keeps the rows that are fit for training.

RECIPE has one [[filters]] table a filter, applied in their order; configs/curate/math.toml is one. `name` may be

    duplicates   the same words as an earlier row       length    too short or too long
    overlap      shares n words with a test set         leak      the prompt holds words of its reference
    answer       answers of other kinds                 pattern   a regular expression found, or not found
    language     another language                       tests     a right solution fails, or a wrong one passes
    pass_rate    too hard or too easy for a given model behind an OpenAI-compatible endpoint

Beside OUT lie OUT.decisions.jsonl, one line for each row read, with the reason where it was dropped; and at the end
OUT.report.json. The same command continues where an earlier one was ended; begin anew by removing OUT's files.
"""

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from rich.console import Console
from rich.progress import Progress

from rewards.endpoint import EndpointError
from rewards.rows import Row, read_rows
from rewards.screens import SCREENS
from rewards.stages import STAGES, Item, Workshop, build

NUM_EXAMPLES = 3  # rows that the report names for each reason
SHOWN = 20  # reasons on the terminal


class Decision(msgspec.Struct, omit_defaults=True):
    """On one row: the filter that dropped it and why, and the length of OUT after it."""

    row: int
    size: int
    filter: str = ""
    why: str = ""
    notes: dict[str, Any] = {}


class Record:
    """OUT and its decisions, which an interrupted run leaves such that the next one can go on."""

    def __init__(self, out: Path, recipe: str):
        self._log_path = out.with_name(out.name + ".decisions.jsonl")
        head = msgspec.json.encode({"recipe": recipe}) + b"\n"
        lines = self._log_path.read_bytes().splitlines(keepends=True) if self._log_path.exists() else []
        if lines and lines[0] != head:
            raise ValueError(f"{self._log_path}: of another recipe or other files; remove it to begin anew")
        whole = [line for line in lines[1:] if line.endswith(b"\n")]  # the last may be torn
        self.decisions = [msgspec.json.decode(line, type=Decision) for line in whole]
        size = self.decisions[-1].size if self.decisions else 0
        self._out = self._open(out, size)
        self._log = self._open(self._log_path, sum(map(len, lines[:1] + whole)))
        if not lines:
            self._log.write(head)

    @staticmethod
    def _open(path: Path, size: int) -> BinaryIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_size < size:
            raise ValueError(f"{path}: shorter than its decisions say; remove both to begin anew")
        os.truncate(path, size)
        return path.open("ab")

    def add(self, item: Item) -> None:
        """OUT is written before the decision that tells its length."""
        if not item.filter:
            self._out.write(msgspec.json.encode(item.row | item.notes) + b"\n")
            self._out.flush()
        decision = Decision(len(self.decisions) + 1, self._out.tell(), item.filter, item.why, item.notes)
        self.decisions.append(decision)
        self._log.write(msgspec.json.encode(decision) + b"\n")
        self._log.flush()

    def close(self) -> None:
        self._out.close()
        self._log.close()


def resumed(rows: Iterable[Row], decisions: list[Decision]) -> Iterator[Item]:
    """The rows, the first of them as an earlier run decided."""
    for row, decision in zip_longest(rows, decisions):
        if row is None:
            raise ValueError("the files have fewer rows than an earlier run read; remove its output to begin anew")
        yield Item(row) if decision is None else Item(row, decision.filter, decision.why, decision.notes, done=True)


def curate(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = tomllib.loads(arguments.recipe.read_text())
    filters: Any = recipe.get("filters")
    tables = isinstance(filters, list) and all(isinstance(table, dict) for table in filters)
    if not tables or len(recipe) > 1:
        raise ValueError(f"{arguments.recipe}: must hold [[filters]] tables, and nothing else")
    digest = hashlib.sha256(repr((recipe, [str(path) for path in arguments.files])).encode()).hexdigest()[:16]
    workshop, started = Workshop(arguments.workers, arguments.deadline), time.monotonic()
    stages = build(filters, workshop)  # before anything is written
    record = Record(arguments.out, digest)
    num_done = len(record.decisions)
    total = sum(path.stat().st_size for path in arguments.files)
    with workshop.exits, Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("rows", total=total)
        rows = read_rows(arguments.files, lambda num_bytes: progress.advance(bar, num_bytes))
        items = resumed(rows, record.decisions[:num_done])
        for stage in stages:
            items = stage(items)
        for item in islice(items, num_done, None):
            record.add(item)
    record.close()
    return report(record.decisions, time.monotonic() - started)


def report(decisions: list[Decision], wall_s: float) -> dict[str, Any]:
    dropped: dict[str, dict[str, Any]] = {}
    for each in decisions:
        if each.filter:
            entry = dropped.setdefault(each.filter, {"rows": 0, "reasons": Counter(), "examples": []})
            entry["rows"] += 1
            entry["reasons"][each.why] += 1
            if len(entry["examples"]) < NUM_EXAMPLES:
                entry["examples"].append({"row": each.row, "why": each.why})
    for entry in dropped.values():
        entry["reasons"] = dict(entry["reasons"].most_common(SHOWN))
    rates = Counter(f"{each.notes['pass_rate']:.3f}" for each in decisions if "pass_rate" in each.notes)
    return {
        "rows": len(decisions),
        "kept": sum(not each.filter for each in decisions),
        "dropped": dropped,
        "pass_rates": dict(sorted(rates.items())),
        "wall_s": round(wall_s, 3),
    }


def options() -> str:
    """Every filter with its options and their defaults, a line each."""
    lines = ["options of the filters (without a default: needed):"]
    for name, maker in {**SCREENS, **STAGES}.items():
        named = [each for each in inspect.signature(maker).parameters.values() if each.kind is each.KEYWORD_ONLY]
        shown = (each.name if each.default is each.empty else f"{each.name} = {each.default!r}" for each in named)
        lines.append(f"    {name:<13}{', '.join(shown)}")
    return "\n".join(lines)


def main() -> int:
    assert __doc__ is not None
    kind = argparse.RawDescriptionHelpFormatter
    about = __doc__.partition(": ")[2]
    parser = argparse.ArgumentParser("rewards.curate", description=about, epilog=options(), formatter_class=kind)
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml", help="[[filters]] tables")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="rows with prompt, answer and so on")
    parser.add_argument("--out", type=Path, required=True, help="JSONL of the rows kept")
    parser.add_argument("--workers", type=int, default=0, help="processes; default: one a core")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds for one completion or row")
    arguments = parser.parse_args()
    try:
        made = curate(arguments)
    except (ValueError, OSError, EndpointError) as error:
        print(f"rewards.curate: {error}", file=sys.stderr)
        return 2
    arguments.out.with_name(arguments.out.name + ".report.json").write_text(json.dumps(made, indent=2) + "\n")
    for name, entry in made["dropped"].items():
        print(f"{entry['rows']:8d} dropped by {name}: {', '.join(list(entry['reasons'])[:3])}")
    print(f"{made['kept']:8d} kept of {made['rows']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

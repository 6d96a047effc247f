"""python -m rewards.score --reward NAME FILE.jsonl ...: judges completions that lie in files.

A row holds `completion` or a list `completions`, and what the reward needs: `prompt`, `answer`, further fields. With
--out every row's verdicts are written, in the order of the rows.
"""

import argparse
import json
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from rewards.pool import Limits
from rewards.rows import Judges, Row, read_rows
from rewards.verdict import Verdict


class Tally:
    """What the verdicts add up to."""

    def __init__(self) -> None:
        self.num_rows = self.num_solved = 0
        self.scores: list[float] = []
        self.errors: Counter[str] = Counter()
        self.costs: Counter[str] = Counter()
        self._started = time.monotonic()

    def add(self, verdicts: list[Verdict]) -> None:
        self.num_rows += 1
        for verdict in verdicts:
            self.costs.update(verdict.costs)
            if verdict.error:
                self.errors[verdict.error] += 1
            else:
                self.scores.append(verdict.score)
                self.num_solved += verdict.solved

    def summary(self) -> dict[str, Any]:
        """Mean score and accuracy are over the completions that could be judged; `costs` are sums."""
        num_judged, wall_s = len(self.scores), time.monotonic() - self._started
        return {
            "rows": self.num_rows,
            "completions": num_judged + self.errors.total(),
            "score": sum(self.scores) / num_judged if num_judged else None,
            "accuracy": self.num_solved / num_judged if num_judged else None,
            "invalid": self.errors.total(),
            "reasons": dict(self.errors.most_common(5)),
            "costs": dict(self.costs),
            "wall_s": round(wall_s, 3),
            "completions_per_s": round((num_judged + self.errors.total()) / wall_s, 1),
        }


def completions_of(rows: Iterator[Row]) -> Iterator[tuple[Row, list[str]]]:
    for row in rows:
        completions = row.get("completions", row.get("completion"))
        completions = [completions] if isinstance(completions, str) else completions
        if not isinstance(completions, list) or not all(isinstance(each, str) for each in completions):
            raise ValueError(f"a row needs `completion` or `completions`, texts; there are {', '.join(row)}")
        yield row, completions


def read_options(text: str) -> dict[str, Any]:
    """Options of a reward: JSON, or the path of a TOML file. Raises `ValueError`."""
    if text.endswith(".toml"):
        return tomllib.loads(Path(text).read_text())
    options = json.loads(text)
    if not isinstance(options, dict):
        raise ValueError(f"--options {text}: a table is needed")
    return options


def score(arguments: argparse.Namespace) -> dict[str, Any]:
    tally, limits = Tally(), Limits(reward_s=arguments.deadline)
    out = arguments.out.open("wb") if arguments.out else None
    total = sum(path.stat().st_size for path in arguments.files)
    with (
        Judges(arguments.reward, read_options(arguments.options), arguments.workers, limits) as judges,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task(arguments.reward, total=total)
        rows = read_rows(arguments.files, lambda num_bytes: progress.advance(bar, num_bytes))
        for _, verdicts in judges.judge(completions_of(rows)):
            tally.add(verdicts)
            if out:
                out.write(msgspec.json.encode({"verdicts": verdicts}) + b"\n")
    if out:
        out.close()
    return tally.summary()


def main() -> int:
    parser = argparse.ArgumentParser(description="Judges completions that lie in JSONL files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--reward", required=True, help="a name of the table of rewards, or package.module:name")
    parser.add_argument("--options", default="{}", help="of the reward: JSON, or the path of a TOML file")
    parser.add_argument("--workers", type=int, default=0, help="processes; default: one a core")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds for one completion")
    parser.add_argument("--out", type=Path, help="JSONL with the verdicts of every row")
    arguments = parser.parse_args()
    try:
        summary = score(arguments)
    except (ValueError, OSError) as error:
        print(f"rewards.score: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

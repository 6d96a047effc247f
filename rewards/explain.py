"""python -m rewards.explain RUN GROUP: why the completions of a group got their rewards, as the ledger has it."""

import argparse
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 110  # where the output is no terminal
GROUP = """
SELECT group_id, domain, prompt_index, state, reason, attempt, generator, lease_version, first_version, taken_version,
       num_tokens FROM groups WHERE group_id = ?"""
COMPLETIONS = """
SELECT sample, length, finish, score, solved, error, parts, evidence, segments, costs
FROM completions WHERE group_id = ? ORDER BY sample"""
UNDONE = "SELECT count(*) FROM events WHERE event = 'undone groups' AND group_id = ?"


def read(ledger: sqlite3.Connection, group_id: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The rows of a group and of its completions. Raises `ValueError` where there is no such group."""
    ledger.row_factory = sqlite3.Row
    group = ledger.execute(GROUP, (group_id,)).fetchone()
    if group is None:
        (last,) = ledger.execute("SELECT max(group_id) FROM groups").fetchone()
        (undone,) = ledger.execute(UNDONE, (group_id,)).fetchone()
        why = "a resume undid it" if undone else f"the last is {last}"
        raise ValueError(f"there is no group {group_id}: {why}")
    return dict(group), [dict(row) for row in ledger.execute(COMPLETIONS, (group_id,))]


def heading(group: dict[str, Any]) -> str:
    end = group["state"] + (f" ({group['reason']})" if group["reason"] else "")
    name = f"group {group['group_id']}: prompt {group['prompt_index']} of {group['domain']}, {end}"
    if group["first_version"] is None:
        return f"{name}; no result yet"
    trained = "" if group["taken_version"] is None else f", taken at {group['taken_version']}"
    sampled = f"sampled by {group['generator']} from version {group['first_version']}{trained}"
    return f"{name}; {group['num_tokens']} tokens, {sampled}"


def explanation(row: dict[str, Any]) -> list[str]:
    """What is known of one verdict, a line each: terms of the score, evidence, segments, costs."""
    parts, evidence, segments, costs = (json.loads(row[key]) for key in ("parts", "evidence", "segments", "costs"))
    lines = [f"no verdict: {row['error']}"] if row["error"] else []
    if parts:
        lines.append(" + ".join(f"{name} {value:g}" for name, value in parts.items()) + f" = {row['score']:g}")
    lines += [f"{name}: {text}" for name, text in evidence.items()]
    if segments:
        lines.append("segments: " + ", ".join(f"{score:g} to {end}" for end, score in segments))
    if costs:
        lines.append("costs: " + ", ".join(f"{name} {value:g}" for name, value in costs.items()))
    return lines


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("sample", "score", "solved", "tokens", show_lines=True)
    made.add_column("", overflow="fold", ratio=1)
    for row in rows:
        score = "-" if row["error"] else f"{row['score']:g}"
        tokens = f"{row['length']}{' (cut)' if row['finish'] == 'length' else ''}"
        solved = "yes" if row["solved"] else "no"
        made.add_row(str(row["sample"]), score, solved, tokens, escape("\n".join(explanation(row))))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Why the completions of a group got their rewards.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run, past or going on")
    parser.add_argument("group", type=int, metavar="GROUP", help="the group's number in the ledger")
    arguments = parser.parse_args()
    try:
        ledger = sqlite3.connect(f"{(arguments.run / 'ledger.db').resolve().as_uri()}?mode=ro", uri=True)
        group, rows = read(ledger, arguments.group)
    except (sqlite3.Error, ValueError) as error:
        print(f"rewards.explain: {arguments.run}: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(escape(heading(group)), soft_wrap=True)
    console.print(table(rows) if rows else "no completions")
    return 0


if __name__ == "__main__":
    sys.exit(main())

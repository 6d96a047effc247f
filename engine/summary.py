"""What a run came to, from its record: `metrics.jsonl` tells of all launches, so a resumed run is summed whole."""

import json
from pathlib import Path
from typing import Any

from engine.schema import State

Row = dict[str, Any]


def records(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl` that count, in their order.

    A torn last line (the job was killed) is left out. A resume undoes what came after its checkpoint: a step undoes
    the earlier rows that are not of an earlier step.
    """
    rows: list[Row] = []
    highest = -1  # step among `rows`
    for text in path.read_text().splitlines():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        if row["kind"] == "step" and row["step"] <= highest:
            rows = [earlier for earlier in rows if earlier["step"] < row["step"]]
            highest = row["step"]
        highest = max(highest, row["step"])
        rows.append(row)
    return rows


def summarise(rows: list[Row], state: State, wall_s: float) -> Row:
    """summary.json: `rows` as `records` gives them, the coordinator's last state, the seconds of the present launch.

    Of earlier launches `wall_s` counts from their first row to their last that counts. Idle shares are of the steps
    alone: start and pinned evaluations do not count. An accuracy that was not measured is None.
    """
    launches = by_launch(rows)
    earlier_steps = [steps for steps in map(only_steps, launches[:-1]) if steps]
    steps = only_steps(rows)
    evaluations = {row["name"]: row for row in rows if row["kind"] == "evaluation"}
    before, after = evaluations.get("before", {}), evaluations.get("after", {})
    busy_s, idle_s = (sum(grown(launch, f"generator_{name}_s") for launch in launches) for name in ("busy", "idle"))
    return {
        "accuracy_before": before.get("accuracy/all"),
        "accuracy_after": after.get("accuracy/all"),
        "accuracy_stderr": after.get("stderr/all"),
        "domains": {
            name.removeprefix("accuracy/"): {"before": before[name], "after": after[name]}
            for name in before.keys() & after.keys()
            if name.startswith("accuracy/") and name != "accuracy/all"
        },
        "wall_s": wall_s + sum(launch[-1]["time"] - launch[0]["time"] for launch in launches[:-1]),
        "steps": len(steps),
        "trained_tokens": sum(row["trained_tokens"] for row in steps),
        "generated_tokens": state.generated_tokens + sum(earlier[-1]["generated_tokens"] for earlier in earlier_steps),
        "max_trained_staleness": max((row["trained_staleness_max"] for row in steps), default=0),
        "groups": state.ends,
        "learner_idle": share(sum(row["wait_s"] for row in steps), sum(row["step_s"] for row in steps)),
        "generator_idle": share(idle_s, busy_s + idle_s),
    }


def by_launch(rows: list[Row]) -> list[list[Row]]:
    """`rows` cut before each row of kind `parity`, of which every launch writes one before its first step."""
    launches: list[list[Row]] = [[]]
    for row in rows:
        if row["kind"] == "parity" and launches[-1]:
            launches.append([])
        launches[-1].append(row)
    return launches


def only_steps(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "step"]


def grown(launch: list[Row], name: str) -> float:
    """What the running total `name` grew by from the first step of a launch to its last."""
    steps = only_steps(launch)
    return steps[-1][name] - steps[0][name] if steps else 0.0


def share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0

"""Runs a job of this engine as a user would and measures its steady state from outside."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2  # steps that are not measured
SAMPLE_S = 0.1
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


ROLES = {  # by what a process's command line holds; all others are "rewards"
    "engine/launch.py": "learner",
    "engine.coordinator_loop": "coordinator",
    "engine.actor_loop": "generator",
}


class Meter(threading.Thread):
    """Samples the processor time of a process and all its descendants, by role; the dead keep what they had used."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid, self._used, self._roles = pid, {}, {}
        self._done = threading.Event()
        self.times: list[float] = []
        self.cpu_s: list[dict[str, float]] = []

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            alive = tree_cpu_s(self._pid)
            self._used |= alive
            self._roles |= {pid: role(pid) for pid in alive}  # anew: a child is its parent's twin until it executes
            used = dict.fromkeys([*ROLES.values(), "rewards"], 0.0)
            for pid, cpu_s in self._used.items():
                used[self._roles[pid]] += cpu_s
            self.times.append(time.time())
            self.cpu_s.append(used)

    def between(self, start: float, end: float) -> dict[str, float]:
        """Processor seconds used between two moments of `time.time()`, by role, by linear interpolation."""
        self._done.set()
        self.join()
        at = {name: np.interp([start, end], self.times, [used[name] for used in self.cpu_s]) for name in self.cpu_s[0]}
        return {name: float(last - first) for name, (first, last) in at.items()}


def role(pid: int) -> str:
    """What the process `pid` does in the job."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        command = ""
    return next((name for part, name in ROLES.items() if part in command), "rewards")


def tree_cpu_s(root: int) -> dict[int, float]:
    """Processor seconds, user and system, of `root` and every descendant alive, by pid."""
    used, parents = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry)] = int(fields[1])
            used[int(entry)] = (int(fields[11]) + int(fields[12])) * TICK_S
    family, grown = {root}, True
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in family} - family
        family |= grown
    return {pid: used[pid] for pid in family if pid in used}


def run(config: Path, directory: Path, overrides: dict[str, Any]) -> dict[str, float]:
    """Figures of a job's steps after the first two: trained tokens, wall and processor seconds, idle shares, rewards.

    Raises `RuntimeError` with the job's last words where it fails.
    """
    options = [f"--{key}={value}" for key, value in {**overrides, "run.directory": directory}.items()]
    process = subprocess.Popen(
        [sys.executable, ROOT / "engine" / "launch.py", config, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    meter = Meter(process.pid)
    meter.start()
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the job ended with code {process.returncode}:\n{said[-2000:]}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    measured = steps[WARM_UP:]
    start, end = steps[WARM_UP - 1]["time"], steps[-1]["time"]
    tokens, wall_s, by_role = sum(row["trained_tokens"] for row in measured), end - start, meter.between(start, end)
    cpu_s = sum(by_role.values())
    rewards = [row["reward"] for row in steps]
    quarter = max(1, len(rewards) // 4)

    def column(figure: str) -> list[float]:
        return [row[figure] for row in measured]

    def grown(counter: str) -> float:
        return steps[-1][counter] - steps[WARM_UP - 1][counter]

    idle_s = grown("generator_idle_s")
    return {
        "trained_tokens": tokens,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        **{f"cpu_s_{name}": used for name, used in by_role.items()},
        "tokens_per_s": tokens / wall_s,
        "tokens_per_cpu_s": tokens / cpu_s,
        "learner_idle": sum(row["wait_s"] for row in measured) / wall_s,
        "generator_idle": idle_s / (idle_s + grown("generator_busy_s")),
        "staleness": float(np.average(column("staleness"), weights=column("trained_tokens"))),
        "reward_first": sum(rewards[:quarter]) / quarter,
        "reward_last": sum(rewards[-quarter:]) / quarter,
    }

"""Is the planner faster, and are its parts as even? python bench/planner.py [--quick]

packing   16,384 sequences into micro-batches of 32,768 tokens; of uniform lengths, whose bins are the fullest, and of
          heavy-tailed ones. Ours also levels the bins' work, which the others do not.
parts     4,096 sequences into 369 parts of even work, 24576 n + n^2 for n tokens

Beside it stand first-fit decreasing and the largest differencing method (Karmarkar and Karp), in plain Python from
their definitions, and TRL's best-fit decreasing, where the peer's environment has been made (as
python bench/loop.py does).

The metric counts processor time, so that other processes hit all alike; rounds are interleaved, TRL's apart.
"""

import argparse
import heapq
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from bench.peers import environment  # noqa: E402
from bench.rounds import rounds_of  # noqa: E402
from engine.ops import plan  # noqa: E402

BUDGET, NUM_SEQUENCES = 32768, 16384
NUM_PARTS, NUM_UNITS = 369, 4096
NUM_RANKS = 8
MOST_SECONDS = {"packing": 0.005, "parts": 0.05}
GOAL = 50.0  # times as fast as the others


def draw_lengths(name: str, num: int) -> np.ndarray:
    random = np.random.default_rng(0)
    draws = {"uniform": random.uniform(1, BUDGET, num), "heavy tail": random.lognormal(7, 1, num)}
    return draws[name].astype(np.int64).clip(1, BUDGET)


def first_fit(lengths: list[int], budget: int) -> list[list[int]]:
    """Each length, greatest first, into the first bin that has room."""
    bins, room = [], []
    for unit in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        chosen = next((b for b, left in enumerate(room) if left >= lengths[unit]), len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(budget)
        bins[chosen].append(unit)
        room[chosen] -= lengths[unit]
    return bins


def largest_differencing(work: list[float], num_parts: int) -> list[list[int]]:
    """The two partitions whose parts are furthest apart become one, heavy parts with light ones, until one is left."""
    states = []
    for unit, amount in enumerate(work):
        parts = [(amount, [unit])] + [(0.0, [])] * (num_parts - 1)
        heapq.heappush(states, (-amount, unit, parts))
    while len(states) > 1:
        (_, _, a), (_, tie, b) = heapq.heappop(states), heapq.heappop(states)
        joined = [(x + y, m + n) for (x, m), (y, n) in zip(a, reversed(b), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(states, (joined[-1][0] - joined[0][0], tie, joined))
    return [members for _, members in states[0][2]]


def best_fit_of_trl(lengths: np.ndarray, rounds: int) -> list[float] | None:
    """Seconds of TRL's packing in its own environment; None where that is not there."""
    python = environment.DIRECTORY / "bin" / "python"
    if not python.exists():
        print(f"TRL is left out: there is no {python}", file=sys.stderr)
        return None
    request = json.dumps({"lengths": lengths.tolist(), "budget": BUDGET, "rounds": rounds})
    command = [python, "-m", "bench.peers.trl_packing"]
    done = subprocess.run(command, check=True, cwd=ROOT, input=request, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def packing_rows(name: str, rounds: int) -> list[dict[str, Any]]:
    lengths = draw_lengths(name, NUM_SEQUENCES)
    work = lengths + lengths.astype(float) ** 2 / 12288
    arms = {
        "ours": partial(plan, lengths, work, BUDGET, NUM_RANKS),
        "first-fit decreasing, plain Python": partial(first_fit, lengths.tolist(), BUDGET),
    }
    figures = rounds_of(arms, rounds, "cpu")
    trl = best_fit_of_trl(lengths, rounds)
    figures |= {"TRL's best-fit decreasing": trl} if trl else {}
    case = f"packing, {name}"
    return [*speed_rows(case, figures), limit_row(case, figures["ours"], MOST_SECONDS["packing"])]


def parts_rows(rounds: int) -> list[dict[str, Any]]:
    lengths = draw_lengths("heavy tail", NUM_UNITS)
    work = 24576 * lengths + lengths.astype(float) ** 2
    arms = {
        "ours": partial(plan, lengths, work, int(lengths.sum()), NUM_PARTS),
        "largest differencing, plain Python": partial(largest_differencing, work.tolist(), NUM_PARTS),
    }
    figures = rounds_of(arms, rounds, "cpu")
    _, rank, _ = plan(lengths, work, int(lengths.sum()), NUM_PARTS)
    bound = max(work.sum() / NUM_PARTS, work.max())
    heaviest = max(work[part].sum() for part in largest_differencing(work.tolist(), NUM_PARTS))
    ours, theirs = bound / np.bincount(rank, work).max(), bound / heaviest
    peer = "largest differencing, plain Python"
    even = results.row("parts", "lower bound / heaviest part", [ours], [theirs], peer, None)
    least = results.row("parts", "lower bound / heaviest part", [ours], [1.0], "lower bound", 0.99)
    return [*speed_rows("parts", figures), limit_row("parts", figures["ours"], MOST_SECONDS["parts"]), even, least]


def speed_rows(case: str, figures: dict[str, list[float]]) -> list[dict[str, Any]]:
    mine = [1 / taken for taken in figures["ours"]]
    return [
        results.row(case, "plans/cpu_s", mine, [1 / taken for taken in theirs], name, GOAL)
        for name, theirs in figures.items()
        if name != "ours"
    ]


def limit_row(case: str, taken: list[float], most: float) -> dict[str, Any]:
    limit = [1 / most] * len(taken)
    return results.row(case, "plans/cpu_s", [1 / each for each in taken], limit, f"{1000 * most:g} ms", 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="the planner has no other")
    parser.add_argument("--quick", action="store_true", help="one round")
    rounds = 1 if parser.parse_args().quick else 5
    rows = [row for name in ("uniform", "heavy tail") for row in packing_rows(name, rounds)] + parts_rows(rounds)
    results.keep("planner", "cpu", rows)


if __name__ == "__main__":
    main()

"""Does a day's load leave anything behind? python bench/soak.py [--completions N | --quick]

20,000 completions go through the scorer and four workers in groups of eight, one in twenty of them malicious: programs
that compute or sleep for ever, eat memory, kill themselves or leave things behind, which cost a sandbox at most; and
rewards that hang or die, which cost a worker. Every verdict must be the one that its completion deserves, no process
may be left at the end, and the memory of all processes together may not grow.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from bench.descendants import descendants  # noqa: E402
from engine import config as configs  # noqa: E402
from engine.schema import Prompt  # noqa: E402
from engine.scorer import Scorer  # noqa: E402
from rewards.verdict import Verdict  # noqa: E402

NUM_COMPLETIONS, GROUP_SIZE = 20_000, 8
NUM_WORKERS = 4  # on two cores: some of them wait for what hangs
AHEAD = 8  # groups at the scorer at once
SAMPLES = 40  # of memory
MALICIOUS = 0.05
HANGING = 0.2  # of the completions whose rewards are malicious; the others die, which costs no deadline
REWARD_S = 8.0  # room for the start of a sandbox on a busy machine
END_S = 5.0  # between the last verdict and the end of the last process
TESTS = {"inputs": ["1 2\n", "30 4\n"], "outputs": ["3\n", "34\n"]}
RIGHT = "print(sum(map(int, input().split())))"

# Domain, completion, and the verdict that it deserves: solved, unsolved, or none ("error").
GOOD = [("code", RIGHT, "solved"), ("code", "print(3)", "unsolved"), ("code", "raise KeyError", "unsolved")]
BAD = [
    ("code", "while True: pass", "unsolved"),
    ("code", "import time; time.sleep(100)", "unsolved"),
    ("code", "import os; os.abort()", "unsolved"),
    ("code", "x = bytearray(1 << 40)", "unsolved"),
    ("code", "import os; os.makedirs('/tmp/a/b'); os._exit(0)", "unsolved"),
    ("code", "while True: print('x' * 10**6)", "unsolved"),
    ("reward", "hang", "error"),
    ("reward", "die", "error"),
]


def behave(prompt: str, completion: str, answer: str, **fields: Any) -> float:
    """A reward that does what the completion says."""
    while completion == "hang":
        signal.pause()
    os._exit(1)


def configuration() -> configs.Config:
    options = {"time_s": 0.3, "total_s": 2.0, "memory_mib": 256}
    code = {"name": "code", "source": "file", "path": "x", "reward": "code", "reward_options": options}
    return configs.parse({
        "run": {"name": "soak", "steps": 1, "groups_per_step": 1, "group_size": GROUP_SIZE},
        "model": {"init": {"model_type": "qwen3"}, "context": 100},
        "domains": [code, {"name": "reward", "source": "file", "path": "x", "reward": "bench.soak:behave"}],
        "generator": {"max_new_tokens": 4, "reward_workers": NUM_WORKERS},
        "learner": {"tokens_per_micro_batch": 1000, "lr": 1e-3},
        "deadlines": {"reward_s": REWARD_S},
    })  # fmt: skip


def draw(randomness: random.Random) -> list[tuple[str, str, str]]:
    """A group of completions, of one domain."""
    if randomness.random() < MALICIOUS / 5:
        rewards = [each for each in BAD if each[0] == "reward"]
        return randomness.choices(rewards, [HANGING, 1 - HANGING], k=GROUP_SIZE)
    bad = [each for each in BAD if each[0] == "code"]
    return [randomness.choice(bad if randomness.random() < 0.8 * MALICIOUS else GOOD) for _ in range(GROUP_SIZE)]


def memory_mib() -> float:
    """Of this process and all below it; what they share counts once."""
    total = 0
    for process in [os.getpid(), *descendants()]:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += int(text.partition("Pss:")[2].split()[0])
    return total / 1024


def survivors() -> list[str]:
    """Names of the processes that still run when all have had time to end."""
    deadline = time.monotonic() + END_S
    while (left := descendants()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(left.values())


def verdict_of(verdict: Verdict) -> str:
    return "error" if verdict.error else "solved" if verdict.solved else "unsolved"


class Soak:
    """Keeps the scorer busy and counts."""

    def __init__(self, num_completions: int):
        self.num_groups = num_completions // GROUP_SIZE
        self.counts: Counter[str] = Counter()
        self.memory: list[float] = []
        self._randomness = random.Random(0)
        self._groups: dict[int, list[tuple[str, str, str]]] = {}
        self._scorer = Scorer(configuration())

    def run(self) -> None:
        """Raises `AssertionError` where a verdict is not the deserved one."""
        drawn = done = 0
        while done < self.num_groups:
            while drawn < self.num_groups and drawn < done + AHEAD:
                self._submit(drawn)
                drawn += 1
            for key, verdicts in self._scorer.poll(1.0):
                self._check(self._groups.pop(key), verdicts)  # type: ignore[arg-type]
                done += 1
                if done % max(1, self.num_groups // SAMPLES) == 0:
                    self._sample(done)
        self.counts["restarts of a worker"] = self._scorer.pool.num_restarts
        self._scorer.close()

    def _sample(self, done: int) -> None:
        self.memory.append(memory_mib())
        print(f"{done * GROUP_SIZE:,} completions, {self.memory[-1]:,.0f} MiB", flush=True)

    def _submit(self, number: int) -> None:
        group = self._groups[number] = draw(self._randomness)
        prompt = Prompt(group[0][0], number, np.ones(1, np.int64), "", "", {"input_output": TESTS})
        self._scorer.submit(number, prompt, [completion for _, completion, _ in group])

    def _check(self, group: list[tuple[str, str, str]], verdicts: list[Verdict]) -> None:
        for (domain, completion, deserved), verdict in zip(group, verdicts, strict=True):
            assert verdict_of(verdict) == deserved, (domain, completion, verdict)
            self.counts[deserved] += 1
            self.counts["malicious"] += (domain, completion, deserved) in BAD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--completions", type=int, default=NUM_COMPLETIONS)
    parser.add_argument("--quick", dest="completions", action="store_const", const=800, help="800 completions")
    num_completions = parser.parse_args().completions
    soak = Soak(num_completions)
    begin = time.perf_counter()
    soak.run()
    taken_s = time.perf_counter() - begin
    left = survivors()
    given = sum(soak.counts[verdict] for verdict in ("solved", "unsolved", "error"))
    quarter = len(soak.memory) // 4
    early, late = median(soak.memory[quarter : 2 * quarter]), median(soak.memory[-quarter:])
    rows = [
        results.row("verdicts as deserved", "completions", [given], [num_completions], "completions given", 1.0),
        results.row("memory, MiB", "second quarter / last", [early], [late], "last quarter", 0.95),
        results.row("processes left", "1 / (1 + their number)", [1.0], [1.0 + len(left)], "none left", 1.0),
        results.row("speed", "completions/s", [given / taken_s], [1.0], "", None),
    ]
    results.keep("soak", "cpu", rows, counts=dict(soak.counts), memory_mib=soak.memory, processes_left=left)


if __name__ == "__main__":
    main()

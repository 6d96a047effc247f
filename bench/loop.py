"""Is the asynchronous loop faster? python bench/loop.py [--device cpu] [--quick]

heavy tail   one model and one heavy-tailed distribution of lengths: this engine at max_staleness 4, the same at 0, and
             the best synchronous placement of the same parts (both cores in each phase), in trained tokens per second
peer         TRL's GRPOTrainer, its best placement, on the same model, prompts, group size and lengths, with each
             completion's own prompt and with shared ones: trained tokens per second of processor time at
             max_staleness 0, where the reward gains the same, and per second at 1

All arms of a round run one after the other, so a noisy machine hits them alike; figures are medians over rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tomli_w  # noqa: E402

from bench import heavy_tail, job, results  # noqa: E402
from bench.models import ANSWER, CONTEXT, make_model, make_prompts  # noqa: E402
from bench.peers import environment  # noqa: E402

PLACEMENTS = tuple({"processes": p, "threads": t} for p, t in ((1, 2), (2, 1), (1, 1)))  # of the peer
OURS = {"own prompts": "false", "shared prompts": "true"}  # learner.share_prefix
SPEED, ECONOMY, GAIN = "tokens_per_s", "tokens_per_cpu_s", "reward_gain"
GOALS = {"own prompts": 2.0, "shared prompts": 3.0}  # of ECONOMY
Figures = dict[str, float]


def write(path: Path, table: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(table))
    return path


def heavy_tail_rounds(folder: Path, rounds: int, steps: int) -> dict[str, list[Figures]]:
    heavy_tail.make_model(folder / "model")
    table = heavy_tail.table(steps=steps)
    table["model"] = {"path": str(folder / "model"), "context": heavy_tail.CONTEXT}
    del table["warm_start"]
    config = write(folder / "heavy_tail.toml", table)
    arms: dict[str, list[Figures]] = {"staleness 4": [], "staleness 0": [], "synchronous": []}
    for number in range(rounds):
        for staleness in (4, 0):
            directory = folder / f"heavy-{staleness}-{number}"
            arms[f"staleness {staleness}"].append(job.run(config, directory, {"run.max_staleness": staleness}))
        arms["synchronous"].append(synchronous(config))
        print(f"heavy tail, round {number}: " + ", ".join(f"{a} {f[-1][SPEED]:,.0f}/s" for a, f in arms.items()))
    return arms


def synchronous(config: Path) -> Figures:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [sys.executable, *launcher, "bench.synchronous", str(config)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peer_rounds(folder: Path, rounds: int, steps: int) -> dict[str, list[Figures]]:
    model, prompts = folder / "peer-model", folder / "prompts.jsonl"
    make_model(model, "small")
    make_prompts(prompts, 4096)
    config = write(folder / "peer.toml", peer_table(model, prompts, steps))
    shared = {"steps": steps, "completions": 128, "group_size": 8, "max_new_tokens": ANSWER, "lr": LR}
    theirs = {"model": model, "prompts": prompts, "reward": "share", **shared}
    arms: dict[str, list[Figures]] = {f"{arm}, staleness {k}": [] for k in (0, 1) for arm in OURS}
    arms |= {name(placement): [] for placement in PLACEMENTS}
    for number in range(rounds):
        for placement in PLACEMENTS:
            figures = environment.run(theirs, processes=placement["processes"], threads=placement["threads"])
            arms[name(placement)].append(figures)
        for staleness in (0, 1):
            for arm, share in OURS.items():
                overrides = {"learner.share_prefix": share, "run.max_staleness": staleness}
                figures = job.run(config, folder / f"peer-{share}-{staleness}-{number}", overrides)
                arms[f"{arm}, staleness {staleness}"].append(figures)
        print(f"peer, round {number}: " + ", ".join(f"{a} {f[-1][ECONOMY]:,.0f}/CPU-s" for a, f in arms.items()))
    return arms


LR = 3e-4


def peer_table(model: Path, prompts: Path, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": "peer", "groups_per_step": 16, "group_size": 8, "steps": steps, "max_staleness": 1},
        "model": {"path": str(model), "context": CONTEXT},
        "domains": [{"name": "digits", "source": "file", "path": str(prompts), "reward": "bench.reward:share"}],
        "generator": {"max_new_tokens": ANSWER, "slots": 128, "threads": 1, "kv": "keep"},
        "learner": {"tokens_per_micro_batch": 4096, "lr": LR, "threads": 1},
        "algorithm": {"filter_uniform": False},
        "checkpoint": {"every": 10**6, "export": False},
        "tracking": {"tensorboard": False, "progress": False},
    }


def name(placement: dict[str, int]) -> str:
    return f"TRL, {placement['processes']} process(es) x {placement['threads']} thread(s)"


def speeds(figures: list[Figures], metric: str) -> list[float]:
    """Of trained tokens; the gain is the mean reward of the last quarter of the steps less that of the first."""
    return [f["reward_last"] - f["reward_first"] if metric == GAIN else f[metric] for f in figures]


def rows(tail: dict[str, list[Figures]], peer: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    made = [
        results.row("heavy tail", SPEED, speeds(tail["staleness 4"], SPEED), speeds(tail[other], SPEED),
                    title, goal)
        for other, title, goal in (
            ("synchronous", "best synchronous placement", 1.15),
            ("staleness 0", "this engine at staleness 0", None),
        )
    ]  # fmt: skip
    for metric, staleness in ((ECONOMY, 0), (GAIN, 0), (SPEED, 1), (GAIN, 1)):
        best = max(map(name, PLACEMENTS), key=lambda arm: sum(speeds(peer[arm], SPEED if metric == SPEED else ECONOMY)))
        for arm in OURS:
            ours = f"{arm}, staleness {staleness}"
            goal = GOALS[arm] if metric == ECONOMY else None
            made.append(results.row(ours, metric, speeds(peer[ours], metric), speeds(peer[best], metric), best, goal))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="one short round, for a look")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds, steps = (1, 5) if arguments.quick else (arguments.rounds, 14)
    with tempfile.TemporaryDirectory(prefix="leeway-bench-") as directory:
        tail = heavy_tail_rounds(Path(directory), rounds, steps)
        peer = peer_rounds(Path(directory), rounds, steps)
    results.keep("loop", arguments.device, rows(tail, peer), rounds={"heavy_tail": tail, "peer": peer})


if __name__ == "__main__":
    main()

"""Do the recipes' parts do at toy scale what their papers say? python bench/recipes/effects.py [NAME ...] [--quick]

Each effect is a few arms over one recipe of configs/tiny, three seeds each, in one process (see loop). For each there
is a table, `bench/results/recipes-NAME-cpu.json` with every curve, and the picture beside it. A model of 100,000
parameters that spells words backwards is no language model that reasons: an effect that shows here is there, one that
does not show says little, and both are kept.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from bench.recipes.loop import Loop  # noqa: E402
from engine.config import load  # noqa: E402

TINY = ROOT / "configs" / "tiny"
LAST = 5  # steps at the end that a curve is judged by


class Effect(NamedTuple):
    claim: str
    recipe: str
    common: list[str]  # overrides of all arms
    arms: dict[str, tuple[int, list[str]]]  # lag and overrides; the first is the reference
    figures: list[str]  # of each step, drawn; the first is what the table tells


def staleness(name: str, slot: str) -> dict[str, tuple[int, list[str]]]:
    arms = (0, 4, 16)
    return {f"{name}, {lag} versions": (lag, [f"--algorithm.correction={slot}"]) for lag in arms}


DAPO = ["--learner.updates_per_step=4", "--algorithm.penalties=[]", "--run.max_staleness=32", "--learner.lr=1e-3"]
EFFECTS = {
    "value_pretraining": Effect(
        "A critic that was trained before the policy moves explains more, and the policy gains by it.",
        "vapo",
        ["--learner.updates_per_step=4"],
        {
            "none": (0, ["--critic.pretrain_steps=0", "--run.steps=20"]),
            "8 steps": (0, ["--critic.pretrain_steps=8", "--run.steps=28"]),
        },
        ["explained_variance", "reward"],
    ),
    "decoupled_gae": Effect(
        "With targets of lambda 1 the critic learns faster than with targets of lambda 0.95, more so for long answers.",
        "vapo",
        ["--critic.pretrain_steps=0", "--run.steps=16", "--learner.updates_per_step=4", "--warm_start.steps=40"],
        {
            f"{words}-letter words, lambda {lam}": (
                0,
                [
                    f"--algorithm.advantage={{ name = 'gae', lambda_critic = {lam}, lambda_policy = 0.95 }}",
                    f"--domains.0.options={{ min_word_len = {words}, max_word_len = {words} }}",
                    "--domains.0.reward=agreement",
                ],
            )
            for words in (3, 8)
            for lam in (0.95, 1.0)
        },
        ["explained_variance", "reward"],
    ),
    "updates": Effect(
        "Four updates a batch lose entropy faster than one.",
        "grpo",
        ["--run.steps=30", "--algorithm.kl.coefficient=0"],
        {f"{n} updates": (0, [f"--learner.updates_per_step={n}"]) for n in (1, 4)},
        ["entropy", "reward"],
    ),
    "dense_rewards": Effect(
        "Where hardly any answer is right, dense rewards teach and sparse ones do not.",
        "grpo",
        [
            "--run.steps=40",
            "--run.group_size=8",
            "--algorithm.kl.coefficient=0",
            "--warm_start.steps=40",
            "--domains.0.options={ min_word_len = 5, max_word_len = 5 }",
        ],
        {"sparse": (0, ["--domains.0.reward=exact"]), "dense": (0, ["--domains.0.reward=agreement"])},
        ["accuracy", "reward"],
    ),
    "length_curriculum": Effect(
        "A short budget first and the long one later comes as far as the long one from the start, with fewer tokens.",
        "grpo",
        ["--run.steps=30", "--algorithm.kl.coefficient=0", "--generator.max_new_tokens=20", "--warm_start.steps=50"],
        {
            "20 tokens": (0, []),
            "6, then 20": (
                0,
                [
                    "--generator.max_new_tokens=6",
                    "--schedule=[{ step = 15, generator = { max_new_tokens = 20 } }]",
                ],
            ),
        },
        ["reward", "length"],
    ),
    "staleness": Effect(
        "Decoupling, and truncated weights, keep what staleness takes away.",
        "dapo",
        [*DAPO, "--run.steps=40"],
        {
            **staleness("none", "{ name = 'none' }"),
            **staleness("decoupled", "{ name = 'decoupled' }"),
            **staleness("tis", "{ name = 'tis', cap = 2.0 }"),
        },
        ["reward", "entropy"],
    ),
}


def run(effect: Effect, seeds: list[int], quick: bool) -> dict[str, list[list[dict[str, Any]]]]:
    """Every step's figures, by arm and seed."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for name, (lag, overrides) in effect.arms.items():
        found[name] = []
        for seed in seeds:
            settings = [*effect.common, *overrides, f"--run.seed={seed}", *(["--run.steps=2"] if quick else [])]
            started = time.process_time()
            rows = list(Loop(load(TINY / f"{effect.recipe}.toml", settings), lag).steps())
            found[name].append([{key: row[key] for key in effect.figures if key in row} for row in rows])
            print(f"{name}, seed {seed}: {time.process_time() - started:.0f} s", flush=True)
    return found


def ends(curves: list[list[dict[str, Any]]], figure: str) -> list[float]:
    """The mean of the last steps, by seed."""
    return [mean(row[figure] for row in rows[-LAST:] if figure in row) for rows in curves]


def draw(effect: Effect, found: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """A panel a figure: the mean over seeds, and in pale each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(effect.figures), figsize=(6 * len(effect.figures), 4), layout="constrained")
    figure.suptitle(effect.claim, fontsize=10)
    for axis, name in zip(axes, effect.figures, strict=True):
        for arm, curves in found.items():
            series = [[row.get(name, float("nan")) for row in rows] for rows in curves]
            (line,) = axis.plot([mean(values) for values in zip(*series, strict=True)], label=arm)
            for values in series:
                axis.plot(values, color=line.get_color(), alpha=0.2, linewidth=0.7)
        axis.set_title(name.replace("_", " "), loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EFFECTS))
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [0] if arguments.quick else [0, 1, 2]
    for name in arguments.names or EFFECTS:
        effect = EFFECTS[name]
        found = run(effect, seeds, arguments.quick)
        reference, *_ = found
        rows = []
        for arm, curves in found.items():
            for figure in effect.figures:
                ours, theirs = ends(curves, figure), ends(found[reference], figure)
                rows.append(
                    {
                        "case": arm,
                        "metric": f"{figure}, last {LAST} steps",
                        "ours": mean(ours),
                        "reference": mean(theirs),
                        "reference_name": reference,
                        "ratio": mean(ours) / mean(theirs) if mean(theirs) else float("nan"),
                        "goal": None,
                        "seeds": ours,
                    }
                )
        path = results.keep(f"recipes-{name}", "cpu", rows, claim=effect.claim, curves=found)
        text = json.loads(path.read_text())
        path.write_text(json.dumps(text) + "\n")  # curves make it long: one line
        draw(effect, found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

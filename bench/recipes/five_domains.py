"""Does one small model gain in five domains at once? python bench/recipes/five_domains.py [--seeds N | --quick]

Mathematics, code, instruction following, logic and function calling in one run of `five_domains.toml`: prompts small
enough for a model made on the spot, with what their rewards need, and demonstrations for its warm start, of which some
are another prompt's. Held-out accuracy of each domain before and after, and its reward at every step.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402

CONFIG = Path(__file__).with_suffix(".toml")
NAMES = ("math", "code", "instructions", "logic", "tools")
LIMIT_S = 1800.0

Row = dict[str, Any]


def draw(seed: int, index: int, *, domain: str) -> Row:
    return DOMAINS[domain](random.Random(f"{seed} {index}"))


def mathematics(rng: random.Random) -> Row:
    a, b = rng.randrange(1, 50), rng.randrange(1, 50)
    return {"prompt": f"{a}+{b}=", "answer": str(a + b), "demonstration": rf"\boxed{{{a + b}}}"}


def code(rng: random.Random) -> Row:
    sign, number = rng.choice("+-*"), rng.randrange(2, 10)
    value = {"+": lambda x: x + number, "-": lambda x: x - number, "*": lambda x: x * number}[sign]
    tests = {"fn_name": "f", "inputs": [[3], [-7], [20]], "outputs": [value(3), value(-7), value(20)]}
    words = {"+": "add", "-": "take", "*": "times"}
    body = f"def f(x): return x{sign}{number}"
    return {"prompt": f"f: {words[sign]} {number}\n", "answer": json.dumps(tests), "demonstration": body}


def instructions(rng: random.Random) -> Row:
    """So many words, all small or all capital letters, with an end given."""
    count, capital, end = rng.randrange(2, 5), rng.random() < 0.5, rng.choice(["end", "bye", "stop"])
    words = ["".join(rng.choices("abcdefgh", k=2)) for _ in range(count - 1)] + [end]
    text = " ".join(words)
    constraints = [
        ("length_constraints:number_words", {"num_words": count, "relation": "at least"}),
        ("length_constraints:number_words", {"num_words": count + 1, "relation": "less than"}),
        (f"change_case:english_{'capital' if capital else 'lowercase'}", {}),
        ("startend:end_checker", {"end_phrase": end}),
    ]
    return {
        "prompt": f"{count} {'BIG' if capital else 'small'} {end}: ",
        "answer": "",
        "instruction_id_list": [name for name, _ in constraints],
        "kwargs": [arguments for _, arguments in constraints],
        "demonstration": text.upper() if capital else text,
    }


def tools(rng: random.Random) -> Row:
    name, a, b = rng.choice(["sum", "max", "pow"]), rng.randrange(100), rng.randrange(100)
    wanted = [{name: {"a": [a], "b": [b]}}]
    number = {"type": "integer"}
    schema = {"properties": {"a": number, "b": number}, "required": ["a", "b"]}
    return {
        "prompt": f"call {name} {a} {b}>",
        "answer": json.dumps(wanted),
        "functions": [{"name": each, "parameters": schema} for each in ("sum", "max", "pow")],
        "demonstration": f"{name}(a={a}, b={b})",
    }


DOMAINS: dict[str, Callable[[random.Random], Row]] = {
    "math": mathematics,
    "code": code,
    "instructions": instructions,
    "tools": tools,
}


def run(directory: Path, seed: int, quick: bool) -> list[dict[str, Any]]:
    """The metrics of a job; raises `subprocess.CalledProcessError` where it fails."""
    brief = ["--run.steps=2", "--warm_start.steps=2"] if quick else []
    command = [sys.executable, str(ROOT / "engine/launch.py"), str(CONFIG), f"--run.directory={directory}"]
    subprocess.run([*command, f"--run.seed={seed}", *brief], check=True, timeout=LIMIT_S)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def entry(domain: str, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The domain's row: means over the runs of accuracy after and before."""
    evaluations = [[row[f"accuracy/{domain}"] for row in rows if row["kind"] == "evaluation"] for rows in runs]
    before, after = (mean(each[place] for each in evaluations) for place in (0, -1))
    return {
        "case": domain,
        "metric": "held-out accuracy",
        "ours": after,
        "reference": before,
        "reference_name": "before",
        "ratio": after / before if before else float(after > 0),
        "goal": 1.0,
        "seeds": evaluations,
    }


def curves(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Mean reward of each domain, by step; None where a step had none of its groups."""
    steps = [row for row in rows if row["kind"] == "step"]
    return {domain: [row.get(f"reward/{domain}") for row in steps] for domain in NAMES}


def picture(runs: list[dict[str, list[float | None]]], path: Path) -> None:
    """A panel a domain, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(NAMES), figsize=(3 * len(NAMES), 3), layout="constrained")
    for axis, domain in zip(axes, NAMES, strict=True):
        for seed, found in enumerate(runs):
            axis.plot([float("nan") if each is None else each for each in found[domain]], label=f"seed {seed}")
        axis.set_title(domain, loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward of samples", fontsize=9)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two steps")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(Path(folder) / f"five-{seed}", seed, arguments.quick) for seed in range(arguments.seeds)]
    found = [curves(rows) for rows in runs]
    path = results.keep("five_domains", "cpu", [entry(domain, runs) for domain in NAMES], curves=found)
    picture(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

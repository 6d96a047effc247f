"""Do the recipes' parts do at toy scale what their papers say? python bench/recipes/effects.py [NAME ...] [--quick]

Each effect is a few arms over one recipe of configs/tiny, three seeds each, in one process (see loop). For each there
is a table, `bench/results/recipes-NAME-cpu.json` with every curve, and the picture beside it. A model of 100,000
parameters that spells words backwards is no language model that reasons: an effect that shows here is there, one that
does not show says little, and both are kept.

Of the recipe an arm changes what its overrides and those of its effect say, no more; those of the effect are the same
for all arms, and none was tuned for one of them. Most begin from a longer warm start than the recipes', after which
seeds differ by more than any method does, and take more answers a step.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from bench.recipes import sampler  # noqa: E402
from bench.recipes.curves import READ, Curves, Points, Rows, Told, draw, values  # noqa: E402
from bench.recipes.loop import steps  # noqa: E402
from engine.config import load  # noqa: E402

TINY = ROOT / "configs" / "tiny"
TASKS = "bench.recipes.tasks:"


class Arm(NamedTuple):
    overrides: list[str]
    lag: int = 0  # versions
    recipe: str = ""  # other than the effect's


class Effect(NamedTuple):
    claim: str
    told: Told
    curves: Callable[
        [list[int], bool], Iterator[Curves]
    ]  # (seeds, quick) -> after each arm all so far, the reference first
    points: Points = ()  # to be drawn instead of curves by step


def trained(recipe: str, common: list[str], arms: dict[str, Arm], seeds: list[int], quick: bool) -> Iterator[Curves]:
    """The arms trained one after the other; of a critic's pretraining nothing is told."""
    found: Curves = {}
    for name, arm in arms.items():
        found[name] = []
        for seed in seeds:
            started, alone = time.process_time(), ["--critic.pretrain_steps=0"] if quick else []
            path = TINY / f"{arm.recipe or recipe}.toml"
            config = load(path, [*common, *arm.overrides, f"--run.seed={seed}", *alone])
            rows = islice(steps(config, arm.lag), config.critic.pretrain_steps, 2 if quick else None)
            found[name].append(list(rows))
            print(f"{name}, seed {seed}: {time.process_time() - started:.0f} s", flush=True)
        yield found


def callable_domain(name: str, task: str, options: str, reward: str) -> str:
    return f"{{ name = '{name}', source = 'callable', task = '{TASKS}{task}', options = {options}, {reward} }}"


def thinking(name: str, chance: str, mark: str, shortest: int, longest: int, limit: int) -> str:
    options = f"{{ mark = '{mark}', shortest = {shortest}, longest = {longest} }}"
    reward = f"reward = '{TASKS}thought', reward_options = {{ chance = '{chance}', limit = {limit} }}"
    return callable_domain(name, "thinking", options, reward)


SMALL, BOTH = "--model.tokenizer.alphabet=abcdefgh=.", "--model.tokenizer.alphabet=abcdefghABCDEFGH="
SIZE = ["--run.groups_per_step=32", "--run.group_size=8", "--generator.slots=256", "--warm_start.steps=300"]


def backwards(letters: int, slips: float, **rewards: str) -> list[str]:
    """Domains of so many letters to be spelled backwards, by name and reward, and a start that has learned all there is
    to learn of demonstrations which get each letter wrong with a chance of about `slips`. So every seed begins alike:
    it knows the task, and `slips` says how likely a right answer is. 256 answers a step."""
    options = f"{{ letters = [{letters}, {letters}], dots = [0, 0], slips = {slips} }}"
    return [domains("rambling", options, **rewards), SMALL, *SIZE]


def capitals(letters: int, slips: float, **rewards: str) -> list[str]:
    """The same in capitals, which demonstrations forget of each letter with a chance of `slips`."""
    return [domains("capitals", f"{{ letters = {letters}, slips = {slips} }}", **rewards), BOTH, *SIZE]


def domains(task: str, options: str, **rewards: str) -> str:
    return f"--domains=[{', '.join(callable_domain(name, task, options, reward) for name, reward in rewards.items())}]"


def words(shortest: int, longest: int, **rewards: str) -> str:
    """Domains of words to be spelled backwards, by name and reward."""
    task = "source = 'reasoning_gym', task = 'spell_backward', question = '{word}='"
    options = f"options = {{ min_word_len = {shortest}, max_word_len = {longest} }}"
    domains = [f"{{ name = '{name}', {task}, {options}, {reward} }}" for name, reward in rewards.items()]
    return f"--domains=[{', '.join(domains)}]"


# ---- the arms --------------------------------------------------------------------------------------------------

LIMIT, BUFFER = 32, 16  # of the penalties' tokens
PENALTIES = {"none": "", "plain": "{ name = 'overlong', ", "difficulty-aware": "{ name = 'difficulty_aware', "}


def two_marks(chance: str) -> list[str]:
    """Easy prompts, whose answers may be short, and hard ones, right by the `chance` of their answer's length."""
    easy, hard = thinking("easy", "easy", "aaaa", 4, 24, LIMIT), thinking("hard", chance, "hhhh", 18, 31, LIMIT)
    return [f"--domains=[{easy}, {hard}]"]


def penalty_arms() -> dict[str, Arm]:
    """No penalty, the plain and the difficulty-aware one, where hard prompts need long answers and where these help
    a little."""
    arms = {}
    for chance in ("steep", "gentle"):
        for name, slot in PENALTIES.items():
            slots = f"[{slot}limit = {LIMIT}, buffer = {BUFFER} }}]" if slot else "[]"
            arms[f"{name}, {chance}"] = Arm([*two_marks(chance), f"--algorithm.penalties={slots}"])
    return arms


def lambda_arms() -> dict[str, Arm]:
    """Answers of one length, right in nine cases of ten or in one: the prompt says which, its value is to be found."""
    arms = {}
    for length in (8, 48):
        domains = [
            thinking(name, name, mark, length, length, length + 2)
            for name, mark in {"likely": "aaaa", "unlikely": "hhhh"}.items()
        ]
        for lam in (0.95, 1.0):
            slot = f"{{ name = 'gae', lambda_critic = {lam}, lambda_policy = 0.95 }}"
            overrides = [f"--domains=[{', '.join(domains)}]", f"--generator.max_new_tokens={length + 2}"]
            arms[f"{length} tokens, lambda {lam}"] = Arm([*overrides, f"--algorithm.advantage={slot}"])
    return arms


LAGS = (1, 4, 8, 16)  # versions
CORRECTIONS = {
    "none": "{ name = 'none' }",
    "decoupled": "{ name = 'decoupled' }",
    "truncated": "{ name = 'tis', cap = 2.0 }",
}


def staleness_arms() -> dict[str, Arm]:
    """Of the newest weights the corrections are 1, so one arm of them is enough."""
    slots = {name: [f"--algorithm.correction={slot}"] for name, slot in CORRECTIONS.items()}
    stale = {f"{lag} versions, {name}": Arm(slot, lag) for lag in LAGS for name, slot in slots.items()}
    return {"0 versions": Arm(slots["none"]), **stale}


def staleness_points() -> Points:
    points = [(name, float(lag), f"{lag} versions, {name}") for name in CORRECTIONS for lag in LAGS]
    return [*((name, 0.0, "0 versions") for name in CORRECTIONS), *points]


def staleness(claim: str, rate: float) -> Effect:
    """Four updates a batch, so that clips and weights have something to do; DAPO without its penalty, which answers of
    four letters never meet."""
    common = [
        *(*backwards(4, 0.3, words=EXACT), "--algorithm.penalties=[]", "--run.steps=60", "--run.max_staleness=32"),
        *("--learner.updates_per_step=4", f"--learner.lr={rate}"),
    ]
    told = [("reward", "mean"), ("reward", "last"), ("clipped", "mean"), ("effective_sample_size", "mean")]
    return Effect(claim, told, partial(trained, "dapo", common, staleness_arms()), staleness_points())


def dense_arms() -> dict[str, Arm]:
    """By process, the judge says how far a part has come or how much of it is right: eq. 2 makes different things of
    the two."""
    judges = {
        "sparse throughout": EXACT,
        "dense by outcome": DENSE,
        "dense by process, how far": f"{DENSE}, reward_options = {{ parts = 3 }}",
        "dense by process, how right": f"reward = '{TASKS}sound', reward_options = {{ parts = 3 }}",
    }
    return {
        name: Arm(capitals(6, 0.75, judged=judge, verified=EXACT), recipe="exprl_process" if "process" in name else "")
        for name, judge in judges.items()
    }


ALONE = "--stages=[]"
EXACT, DENSE = "reward = 'exact'", "reward = 'agreement'"
OPTIONS = "{ letters = [4, 4], dots = [0, 20] }"
RAMBLING = callable_domain("words", "rambling", OPTIONS, f"reward = '{TASKS}after_dots'")

EFFECTS = {
    "value_pretraining": Effect(
        "A critic that was trained before the policy moves explains more, and the policy gains by it.",
        [("explained_variance", "first"), ("explained_variance", "last"), ("reward", "mean"), ("reward", "last")],
        partial(
            trained,
            "vapo",
            [
                *two_marks("steep"),
                *("--run.groups_per_step=16", "--run.group_size=8", "--learner.updates_per_step=4"),
                *(f"--generator.max_new_tokens={LIMIT}", "--model.context=40", "--warm_start.steps=100"),
            ],
            {
                "none": Arm(["--critic.pretrain_steps=0", "--run.steps=40"]),
                "30 steps": Arm(["--critic.pretrain_steps=30", "--run.steps=70"]),
            },
        ),
    ),
    "decoupled_gae": Effect(
        "Of a policy that stands still, targets of lambda 1 teach the critic faster than those of 0.95, more so the "
        "longer the answers.",
        [("explained_variance", "mean"), ("explained_variance", "last")],
        partial(
            trained,
            "vapo",
            [
                *("--critic.pretrain_steps=0", "--run.steps=24", "--run.group_size=2", "--learner.updates_per_step=4"),
                *("--learner.lr=1e-12", "--model.context=96", "--warm_start.steps=60"),
            ],
            lambda_arms(),
        ),
    ),
    "length_curriculum": Effect(
        "A short budget first and the long one later comes further than the long one from the start, on fewer tokens.",
        [("accuracy", "mean"), ("accuracy", "last"), ("length", "last"), ("tokens", "total")],
        partial(
            trained,
            "acereason",
            [
                *(ALONE, f"--domains=[{RAMBLING}]", SMALL, *SIZE),
                *("--warm_start.steps=600", "--run.steps=60", "--model.context=40"),
            ],
            {
                "28 tokens": Arm(["--generator.max_new_tokens=28"]),
                "10, 18, then 28": Arm(
                    [
                        "--generator.max_new_tokens=10",
                        "--schedule=[{ step = 20, generator = { max_new_tokens = 18 } }, "
                        "{ step = 40, generator = { max_new_tokens = 28 } }]",
                    ]
                ),
            },
        ),
    ),
    "updates": Effect(
        "Four updates a batch lose entropy faster than one.",
        [("entropy", "mean"), ("entropy", "last"), ("reward", "last")],
        partial(
            trained,
            "acereason",
            [ALONE, words(3, 4, math=EXACT), "--run.steps=40", "--run.group_size=8", "--learner.lr=5e-4"],
            {
                "1 update": Arm(["--learner.updates_per_step=1"]),
                "4 updates": Arm(["--learner.updates_per_step=4", "--algorithm.loss={ name = 'ppo_clip' }"]),
                "4 updates, clip-higher": Arm(
                    [
                        "--learner.updates_per_step=4",
                        "--algorithm.loss={ name = 'ppo_clip', low = 0.2, high = 0.28 }",
                    ]
                ),
            },
        ),
    ),
    "dense_rewards": Effect(
        "Where hardly any answer is right, dense rewards before sparse ones teach what sparse ones alone do not.",
        [("accuracy", "mean"), ("accuracy", "last"), ("reward", "last")],
        partial(trained, "exprl", ["--run.steps=70", "--stages.1.run.steps=30"], dense_arms()),
    ),
    "length_penalties": Effect(
        "The difficulty-aware penalty shortens answers as the plain one does, and spares the hard prompts.",
        [(f"{name}/{domain}", "last") for name in ("accuracy", "length") for domain in ("easy", "hard")],
        partial(
            trained,
            "apriel",
            [
                *("--run.steps=20", "--run.groups_per_step=8", f"--generator.max_new_tokens={LIMIT}"),
                *("--model.context=40", "--warm_start.steps=100", "--learner.warmup_steps=0"),
            ],
            penalty_arms(),
        ),
    ),
    "staleness": staleness("Decoupling, and truncated weights, keep what staleness takes away.", 3e-4),
    "staleness_fast": staleness(
        "At three times the rate the same; a clip against the policy that sampled is a brake, weights are none.", 1e-3
    ),
    "sampler": Effect(
        "Among what is trained, shares of one half: times of 1 to 10 pass, losses of 10% and 70% only a deficit mends.",
        [("share", "first"), ("share", "last")],
        lambda seeds, quick: sampler.curves(ROOT, seeds, 200 if quick else 1600),
    ),
}


# ---- tables --------------------------------------------------------------------------------------------------


def table(effect: Effect, found: Curves) -> list[dict[str, Any]]:
    """A row for each arm and figure; `apart` where no seed of the arm lies among the reference's."""
    reference, *_ = found
    rows = []
    for arm, curves in found.items():
        for figure, read in effect.told:
            ours, theirs = (
                [READ[read](values(each, figure)) for each in side if values(each, figure)]
                for side in (curves, found[reference])
            )
            if not ours or not theirs:
                continue
            rows.append(
                {
                    "case": arm,
                    "metric": f"{figure}, {read}",
                    "ours": mean(ours),
                    "reference": mean(theirs),
                    "reference_name": reference,
                    "ratio": mean(ours) / mean(theirs) if mean(theirs) else 0.0,
                    "goal": None,
                    "seeds": ours,
                    "apart": min(ours) > max(theirs) or max(ours) < min(theirs),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EFFECTS))
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--draw", action="store_true", help="the pictures again, from what was kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two steps of one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names or EFFECTS:
        effect, bench = EFFECTS[name], f"recipes-{name}"
        if arguments.draw:
            path = results.RESULTS / f"{bench}-cpu.json"
            picture(effect, json.loads(path.read_text())["curves"], path)
            continue
        seeds = list(range(1 if arguments.quick else arguments.seeds))
        for found in effect.curves(seeds, arguments.quick):
            keep(bench, effect, found)


def keep(bench: str, effect: Effect, found: Curves) -> None:
    curves = {arm: [brief(effect, rows) for rows in curves] for arm, curves in found.items()}
    path = results.keep(bench, "cpu", table(effect, found), claim=effect.claim, curves=curves)
    path.write_text(json.dumps(json.loads(path.read_text())) + "\n")  # curves make it long: one line
    picture(effect, found, path)


def picture(effect: Effect, found: Curves, path: Path) -> None:
    draw(effect.claim, effect.told, effect.points, found, path.with_suffix(".png"))


def brief(effect: Effect, rows: Rows) -> Rows:
    """What is kept of a curve."""
    names = dict.fromkeys(figure for figure, _ in effect.told)
    return [{name: round(row[name], 5) for name in names if name in row} for row in rows]


if __name__ == "__main__":
    main()

"""Shares of two domains among trained groups, where answers of one take ten times as long, or are lost more often.

The coordinator with its cursor, tally, buffer and ledger as a job has them, on a clock of its own: a generator of 64
places whose groups take times drawn from an exponential distribution, a learner that takes none. A group is lost where
its scores are uniform, which the filter then sees.
"""

import heapq
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine import tokenizer as tokenizers
from engine.config import Config, load
from engine.coordinator import Coordinator
from engine.ledger import Ledger
from engine.prompts import Prompts
from engine.schema import Applied, Group, Lease, Trained
from engine.scores import scheduled_shape
from rewards.verdict import Verdict

NAMES = ("short", "long")
SECONDS = {"short": 1.0, "long": 10.0}  # mean time of a group
PLACES = 64  # groups sampled at once
SIZE = 2  # of a group


def configure(root: Path, mixture: str, seed: int) -> Config:
    """Apriel's recipe with two equal domains, and a staleness that no group reaches here."""
    domain = "{{ name = '{}', source = 'callable', task = 'bench.recipes.sampler:row' }}"
    overrides = [
        f"--domains=[{', '.join(domain.format(name) for name in NAMES)}]",
        f"--curriculum.mixture.name={mixture}",
        f"--run.group_size={SIZE}",
        "--run.max_staleness=1000",
        "--algorithm.penalties=[]",
        f"--run.seed={seed}",
    ]
    adaptive = ["--curriculum.mixture={ name = 'adaptive' }"] if mixture != "adaptive" else []
    return load(root / "configs" / "tiny" / "apriel.toml", [*adaptive, *overrides])


def row(seed: int, index: int) -> dict[str, str]:
    return {"prompt": "a=", "answer": "a"}


def shares(config: Config, survival: dict[str, float], num_groups: int) -> Iterator[float]:
    """The share of the first domain among all groups trained, after every take up to `num_groups` groups."""
    random = np.random.default_rng(config.run.seed)
    with tempfile.TemporaryDirectory() as folder:
        coordinator = begun(config, Path(folder))
        running: list[tuple[float, int, Lease]] = []
        now = 0.0
        while (trained := coordinator.draws.tally.trained).total() < num_groups:
            coordinator.request("g", (PLACES - len(running)) * SIZE, now)
            for lease in coordinator.grants(now).get("g", []):
                ends = now + SECONDS[lease.prompt.domain] * random.exponential()
                heapq.heappush(running, (ends, lease.group_id, lease))
            now, _, lease = heapq.heappop(running)
            survives = random.random() < survival[lease.prompt.domain]
            coordinator.arrived(result(coordinator, lease, survives), now)
            if step(coordinator, config.run.groups_per_step, now):
                yield trained[NAMES[0]] / trained.total()


def begun(config: Config, folder: Path) -> Coordinator:
    prompts, shape = Prompts(config, tokenizers.load(config.model)), scheduled_shape(config)
    coordinator = Coordinator(config, prompts, Ledger(folder / "ledger.db"), shape)
    coordinator.begin(0.0)
    coordinator.published(0, 0.0)
    coordinator.join("g", 0.0)
    coordinator.applied("g", Applied(coordinator.incarnation, 0, 0.0, 0.0), 0.0)
    return coordinator


def result(coordinator: Coordinator, lease: Lease, survives: bool) -> Group:
    """Right and wrong where the group survives; where it does not, right and right."""
    return Group(
        kind="train",
        group_id=lease.group_id,
        attempt=lease.attempt,
        incarnation=coordinator.incarnation,
        generator="g",
        domain=lease.prompt.domain,
        lease_version=lease.version,
        temperature=1.0,
        prompt_ids=lease.prompt.token_ids,
        lengths=[1] * SIZE,
        finish=["stop"] * SIZE,
        verdicts=[Verdict.of(1.0), Verdict.of(0.0 if survives else 1.0)],
        token_ids=np.ones(SIZE, np.int32),
        logprobs=np.zeros(SIZE, np.float32),
        versions=np.full(SIZE, lease.version, np.int32),
        loss_mask=np.ones(SIZE, np.uint8),
    )


def step(coordinator: Coordinator, num_groups: int, now: float) -> bool:
    """The learner's side, which takes no time: a take where there are groups enough, its weights applied at once."""
    version = coordinator.version
    taken = coordinator.take(num_groups, version, now)
    if taken is None:
        return False
    coordinator.trained(Trained(version + 1, [group.group_id for group in taken.groups], "trained"))
    coordinator.published(version + 1, now)
    coordinator.applied("g", Applied(coordinator.incarnation, version + 1, 0.0, 0.0), now)
    return True


def curves(root: Path, seeds: list[int], num_groups: int) -> Iterator[dict[str, list[list[dict[str, Any]]]]]:
    """The share by arm, seed and take, after each arm."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for lost, survival in {"none lost": (1.0, 1.0), "10% and 70% lost": (0.9, 0.3)}.items():
        for mixture in ("static", "adaptive", "deficit"):
            configs = [configure(root, mixture, seed) for seed in seeds]
            kept: dict[str, float] = dict(zip(NAMES, survival, strict=True))
            found[f"{mixture}, {lost}"] = [
                [{"share": share} for share in shares(config, kept, num_groups)] for config in configs
            ]
            yield found

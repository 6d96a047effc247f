"""What the coordinator needs around it, small: prompts that are their own index, groups made by hand."""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config, parse
from engine.coordinator import Coordinator, Note
from engine.ledger import Ledger
from engine.schema import Applied, Group, Heartbeat, Lease, Prompt, Taken, Trained
from engine.tally import Tally
from rewards.verdict import Verdict


class CountingPrompts:
    """Draws ("a", 0), ("a", 1), ... and holds out three."""

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, tally: Tally, left_out: Container[str]) -> tuple[str, int]:
        self.drawn += 1
        return "a", self.drawn - 1

    def is_wanted(self, name: str, index: int, tally: Tally) -> bool:
        return True

    def comes_again(self, domain: str) -> bool:
        return False

    def prompt(self, domain: str, index: int) -> Prompt:
        return Prompt(domain, index, np.array([index], np.int32), str(index), str(index))

    def held_out(self) -> list[Prompt]:
        return [self.prompt("a", 1000 + index) for index in range(3)]

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def config(
    *, steps: int = 1000, max_staleness: int = 1, groups_per_step: int = 2, group_size: int = 2, **deadlines: float
) -> Config:
    return parse(
        {
            "run": {
                "name": "test",
                "steps": steps,
                "groups_per_step": groups_per_step,
                "group_size": group_size,
                "max_staleness": max_staleness,
            },
            "model": {"path": "none", "context": 16},
            "domains": [{"name": "a", "source": "callable", "task": "none:none"}],
            "generator": {"max_new_tokens": 8},
            "learner": {"tokens_per_micro_batch": 64, "lr": 1e-3},
            "evaluation": {"samples": 2},
            "deadlines": deadlines,
        }
    )


def coordinator(settings: Config, directory: Path, note: Callable[[Note], None] = lambda note: None) -> Coordinator:
    return Coordinator(settings, CountingPrompts(), Ledger(directory / "ledger.db"), raw_scores, note)


def raw_scores(group: Group) -> np.ndarray:
    return np.array([verdict.score for verdict in group.verdicts])


def result(
    lease: Lease,
    incarnation: int = 0,
    *,
    generator: str = "g",
    scores: Callable[[int], float] = float,
    versions: list[int] | None = None,
    errors: int = 0,
) -> Group:
    """A finished lease: each sample is as many tokens as `versions` (by default one, of the lease's version); sample i
    is scored `scores(i)`, the first `errors` are beyond judgement."""
    stamps = [lease.version] if versions is None else versions
    num_tokens = len(stamps) * lease.num_samples
    verdicts = [
        Verdict.failed("died") if sample < errors else Verdict.of(scores(sample)) for sample in range(lease.num_samples)
    ]
    return Group(
        kind=lease.kind,
        group_id=lease.group_id,
        attempt=lease.attempt,
        incarnation=incarnation,
        generator=generator,
        domain=lease.prompt.domain,
        lease_version=lease.version,
        temperature=lease.sampling.temperature,
        prompt_ids=lease.prompt.token_ids,
        lengths=[len(stamps)] * lease.num_samples,
        finish=["stop"] * lease.num_samples,
        verdicts=verdicts,
        token_ids=np.zeros(num_tokens, np.int32),
        logprobs=np.zeros(num_tokens, np.float32),
        versions=np.array(stamps * lease.num_samples, np.int32),
        loss_mask=np.ones(num_tokens, np.uint8),
    )


# ---- a coordinator and what its neighbours do --------------------------------------------------------------------


def begun(tmp_path: Path, *, snapshot: bytes | None = None, **settings: float) -> Coordinator:
    """A job whose weights are published, without generators yet."""
    made = coordinator(config(**settings), tmp_path)  # type: ignore[arg-type]
    made.begin(0.0, snapshot)
    made.published(made.version, 0.0)
    return made


def enter(coordinator: Coordinator, name: str, num_samples: int, now: float = 0.0) -> list[Lease]:
    """A generator joins, applies the newest weights and asks; what it is granted."""
    coordinator.join(name, now)
    coordinator.applied(name, applied(coordinator.roster.published, coordinator.incarnation), now)
    coordinator.request(name, num_samples, now)
    return coordinator.grants(now).get(name, [])


def give(coordinator: Coordinator, *leases: Lease, now: float = 1.0, uniform: bool = False) -> list[str]:
    """The leases' results arrive; the reasons of the acknowledgements."""
    scores = (lambda sample: 1.0) if uniform else float
    results = [result(lease, coordinator.incarnation, scores=scores) for lease in leases]
    return [coordinator.arrived(result, now).reason for result in results]


def applied(version: int, incarnation: int = 0) -> Applied:
    return Applied(incarnation, version, stage_s=0.0, pause_s=0.0)


def beat(*held: Lease) -> Heartbeat:
    return Heartbeat([lease.key for lease in held], 0, 0.0, 0.0)


def step(coordinator: Coordinator, taken: Taken | None, end: str = "trained") -> None:
    assert taken is not None
    version = coordinator.version + 1
    group_ids = [group.group_id for group in taken.groups]
    coordinator.trained(Trained(version, group_ids, end))  # type: ignore[arg-type]
    coordinator.published(version, 2.0)

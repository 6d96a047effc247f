"""What a step tells of its health, and where it is written."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config
from engine.schema import Evaluation, State, Taken

IDLE = 0.15  # a side that waits for more than this share of the time is not the bottleneck


def rollouts(taken: Taken, version: int) -> dict[str, Any]:
    """What the groups of a take say before training: rewards, lengths and, weighted by token, their staleness.

    staleness = version - token.version, split at the arrival of the group into `in_flight` (old when it came) and
    `in_queue` (aged while it waited). `staleness_histogram[d]` counts tokens of staleness d.
    """
    verdicts = [(group.domain, verdict) for group in taken.groups for verdict in group.verdicts if not verdict.error]
    lengths = np.concatenate([group.lengths for group in taken.groups])
    truncated = [finish == "length" for group in taken.groups for finish in group.finish]
    staleness = np.concatenate([version - group.versions for group in taken.groups])
    in_queue = np.concatenate([
        np.full(len(group.versions), version - arrival)
        for group, arrival in zip(taken.groups, taken.arrival_versions, strict=True)
    ])
    domains = sorted({domain for domain, _ in verdicts})
    return {
        "reward": _mean([verdict.score for _, verdict in verdicts]),
        "accuracy": _mean([verdict.solved for _, verdict in verdicts]),
        **{f"accuracy/{name}": _mean([v.solved for domain, v in verdicts if domain == name]) for name in domains},
        "invalid_completions": len(lengths) - len(verdicts),
        "length": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated": _mean(truncated),
        "staleness": _mean(staleness),
        "staleness_max": int(staleness.max(initial=0)),
        "staleness_in_flight": _mean(staleness - in_queue),
        "staleness_in_queue": _mean(in_queue),
        "staleness_histogram": np.bincount(np.maximum(staleness, 0)).tolist(),
        "kv_mixed": _mean([group.kv_mixed for group in taken.groups]),
        "queue_s": _mean(taken.queue_s),
        "buffered_groups": taken.state.buffered_groups,
        "leased_groups": taken.state.leased_groups,
        "generators": len(taken.state.generators),
    }


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0


class Pace:
    """Both sides' speed and idle share between two steps."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._state: State | None = None
        self._learner_idle_s = self._learner_s = 0.0
        self._generator_idle_s = self._generator_s = 0.0
        self.trained_tokens = 0

    def step(self, state: State, waited_s: float, trained_tokens: int) -> dict[str, Any]:
        """Figures of the time since the last call, in which the learner waited `waited_s` for its groups."""
        now = time.monotonic()
        wall_s, self._at = now - self._at, now
        before, self._state = self._state or state, state
        busy_s = state.generator_busy_s - before.generator_busy_s
        idle_s = state.generator_idle_s - before.generator_idle_s
        generated = state.generated_tokens - before.generated_tokens
        self._learner_idle_s += waited_s
        self._learner_s += wall_s
        self._generator_idle_s += max(0.0, idle_s)
        self._generator_s += max(0.0, busy_s + idle_s)
        self.trained_tokens += trained_tokens
        learner_idle = waited_s / wall_s if wall_s else 0.0
        generator_idle = max(0.0, idle_s) / (busy_s + idle_s) if busy_s + idle_s > 0 else 0.0
        return {
            "step_s": wall_s,
            "wait_s": waited_s,
            "learner_idle": learner_idle,
            "generator_idle": generator_idle,
            "trained_tokens": trained_tokens,
            "generated_tokens": state.generated_tokens,
            "trained_tokens_per_s": trained_tokens / wall_s if wall_s else 0.0,
            "generated_tokens_per_s": max(0, generated) / wall_s if wall_s else 0.0,
            "bottleneck": bottleneck(learner_idle, generator_idle),
        }

    @property
    def learner_idle(self) -> float:
        return self._learner_idle_s / self._learner_s if self._learner_s else 0.0

    @property
    def generator_idle(self) -> float:
        return self._generator_idle_s / self._generator_s if self._generator_s else 0.0


def bottleneck(learner_idle: float, generator_idle: float) -> str:
    """One line: which side holds the job up, and what would help."""
    if learner_idle > IDLE and generator_idle > IDLE:
        return "both sides wait: raise max_staleness, or look at the rewards and the stragglers"
    if learner_idle > IDLE:
        return "generation is the bottleneck: add generators or slots"
    if generator_idle > IDLE:
        return "training is the bottleneck: add learners, or raise max_staleness"
    return "balanced"


class Recorder:
    """Writes every record to `metrics.jsonl`, its numbers to TensorBoard and, when configured, Weights & Biases."""

    def __init__(self, config: Config, path: Path, tensorboard: Path):
        self._file = path.open("a", buffering=1)
        self._writers: list[Any] = []
        if config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(tensorboard))
            self._writers.append(lambda record, step: [writer.add_scalar(k, v, step) for k, v in record.items()])
        if config.tracking.wandb_project:
            import wandb

            run = wandb.init(project=config.tracking.wandb_project, name=config.run.name, dir=str(path.parent))
            self._writers.append(lambda record, step: run.log(record, step=step))

    def record(self, record: dict[str, Any]) -> None:
        """`record` has `kind` and `step` beside its figures."""
        self._file.write(json.dumps({"time": time.time(), **record}) + "\n")
        prefix = record["kind"]
        numbers = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for write in self._writers:
            write(numbers, record["step"])

    def close(self) -> None:
        self._file.close()


def evaluation_record(evaluation: Evaluation, step: int) -> dict[str, Any]:
    """A row of `metrics.jsonl` for an evaluation."""
    figures = {
        f"{figure}/{domain}": getattr(score, figure)
        for domain, score in evaluation.scores.items()
        for figure in ("accuracy", "stderr", "reward", "num_completions", "num_invalid", "mean_length")
    }
    return {
        "kind": "evaluation",
        "step": step,
        "name": evaluation.name,
        "first_version": evaluation.first_version,
        "last_version": evaluation.last_version,
        "wall_s": evaluation.wall_s,
        **figures,
    }

"""What a step tells of its health, and where it is written.

A row of `metrics.jsonl` has `kind` (`step`, `evaluation` or `parity`), `step` and `time` (seconds since the epoch).
A row of kind `step` says how version `step` was made of the one before it:

name                          unit       meaning
reward, reward/DOMAIN         score      mean raw score of the valid completions
accuracy, accuracy/DOMAIN     share      of them that solved their task
num_invalid                   count      completions beyond judgement: in no figure here but the lengths
num_invalid/DOMAIN            count      of them those of one domain
COST/DOMAIN                   -          what a judgement took on average, by the reward's name for it: judge_s
temperature                   -          mean of the completions'
length, length_max            tokens     mean and longest completion
truncated                     share      completions cut off at the token limit
staleness, staleness_max      versions   mean and largest age of a token: version trained at - version sampled by
trained_staleness_max         versions   the largest age of a token that carried a gradient
staleness_in_flight           versions   mean part of it that the token had when its group arrived
staleness_in_queue            versions   mean part of it that the group spent waiting to be trained
staleness_histogram           tokens     how many tokens were 0, 1, 2, ... versions old
in_flight_histogram           tokens     the same of the part in flight
in_queue_histogram            tokens     the same of the part in queue
queue_s, queue_s_max          seconds    mean and longest wait of a group between arrival and take
kv_mixed                      share      groups sampled in part with an older version's KV cache
buffered_groups               groups     arrived and not yet taken, after this take
leased_groups                 groups     at the generators
generators                   count      generators in the job
transfer_s, transfer_bytes    -          what the newest weights took to the slowest generator, while it sampled on
transfer_link_share           share      of the most bytes a second that this generator has seen
pause_s                       seconds    in which it sampled nothing, to apply them
effective_sample_size         share      (sum rho)^2 / (n sum rho^2), rho = policy / behaviour: 1 on policy
mismatch                      nats       mean |log policy - log behaviour| of tokens of staleness 0: what generator and
                                         learner compute differently; left out of a step without such tokens
drift                         nats       the same of all tokens: mismatch and what the policy moved since
drift_k1, drift_k2, drift_k3  nats       estimates of the divergence of behaviour from policy, by the formulas of `kl`
ratio, weight                 ratio      mean rho; mean weight given by the correction
clipped, rejected             share      tokens clipped by the loss; tokens given weight 0 by the correction
kl                            nats       estimated divergence from the reference policy, where there is one
entropy                       nats       of the policy's choice of a token, where the method measures it
explained_variance            share      of its targets' variance that the critic's values explain, before its update
value, value_target           score      means of the critic's values and of their targets
value_loss                    score^2    half the mean square of their difference
critic_grad_norm, critic_lr   -          gradient norm and learning rate of the critic
critic_skipped_updates        count      of its updates, because loss or gradient was not finite
loss, grad_norm, lr           -          mean loss; largest gradient norm before clipping; learning rate
skipped_updates               count      updates left out because loss or gradient was not finite
gpu_memory_gb                 GB         the most that tensors held at once on the GPU of rank 0, where it has one
num_tokens                    tokens     that the policy chose in valid completions: the normaliser of `token_mean`
num_stale_tokens              tokens     of them masked because they were older than `run.max_staleness`
trained_tokens                tokens     of them the others, which carried a gradient
step_s                        seconds    from the end of the last step to the end of this one
wait_s, train_s, publish_s    seconds    of them waiting for groups, training, writing the weights
generated_tokens              tokens     by all generators since the job started, evaluation included
generator_busy_s              seconds    all generators' time sampling since the job started
generator_idle_s              seconds    all generators' time with nothing to sample
learner_idle, generator_idle  share      of each side's time spent waiting, over the last WINDOW_S
trained_tokens_per_s          tokens/s   over the last WINDOW_S
generated_tokens_per_s        tokens/s   likewise
bottleneck                    -          which side holds the job up, and what would help

Staleness is weighted by token, over the tokens that the policy chose in valid completions. A row of kind `evaluation`
has `name`, `first_version` and `last_version` of the tokens measured, `wall_s`, and every figure of `schema.Score` as
FIGURE/DOMAIN; a row of kind `parity` has `mismatch` as measured on purpose when the job started.
"""

import importlib.util
import math
import time
from collections import deque
from collections.abc import Callable
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from engine.config import Config, ConfigError
from engine.schema import Applied, Evaluation, Group, State, Taken
from rewards.verdict import Verdict

IDLE = 0.15  # a side that waits for more than this share of the time is not the bottleneck
WINDOW_S = 10.0  # several heartbeats: generators tell their counters with these only

Record = dict[str, Any]
Numbers = dict[str, int | float]


# ---- rollouts ------------------------------------------------------------------------------------------------------


def rollouts(taken: Taken, version: int) -> Record:
    """What the groups of a take say of themselves when the learner, at `version`, is about to train on them."""
    return _judgements(taken.groups) | _lengths(taken.groups) | _staleness(taken, version) | _queue(taken)


def _judgements(groups: list[Group]) -> Record:
    verdicts: dict[str, list[Verdict]] = {}
    for group in sorted(groups, key=lambda group: group.domain):
        verdicts.setdefault(group.domain, []).extend(group.verdicts)
    everywhere = _judged([each for judged in verdicts.values() for each in judged])
    return everywhere | {
        f"{name}/{domain}": value
        for domain, judged in verdicts.items()
        for name, value in (_judged(judged) | _costs(judged)).items()
    }


def _judged(verdicts: list[Verdict]) -> Record:
    valid = [verdict for verdict in verdicts if not verdict.error]
    return {
        "reward": _mean([verdict.score for verdict in valid]),
        "accuracy": _mean([verdict.solved for verdict in valid]),
        "num_invalid": len(verdicts) - len(valid),
    }


def _costs(verdicts: list[Verdict]) -> Record:
    names = sorted({name for verdict in verdicts for name in verdict.costs})
    return {name: _mean([verdict.costs[name] for verdict in verdicts if name in verdict.costs]) for name in names}


def _lengths(groups: list[Group]) -> Record:
    lengths = [length for group in groups for length in group.lengths]
    temperatures = [group.temperature for group in groups for _ in group.lengths]
    return {
        "temperature": _mean(temperatures),
        "length": _mean(lengths),
        "length_max": max(lengths, default=0),
        "truncated": _mean([finish == "length" for group in groups for finish in group.finish]),
    }


def _staleness(taken: Taken, version: int) -> Record:
    """The age of every token at `version`, split at the arrival of its group: in flight before, in queue after."""
    sampled = [group.versions[_counted(group)] for group in taken.groups]
    arrived = np.repeat(taken.arrival_versions, [len(versions) for versions in sampled])
    in_flight, in_queue = arrived - np.concatenate(sampled), version - arrived
    staleness = in_flight + in_queue
    return {
        "staleness": _mean(staleness),
        "staleness_max": int(staleness.max(initial=0)),
        "staleness_in_flight": _mean(in_flight),
        "staleness_in_queue": _mean(in_queue),
        "staleness_histogram": np.bincount(staleness).tolist(),
        "in_flight_histogram": np.bincount(in_flight).tolist(),
        "in_queue_histogram": np.bincount(in_queue).tolist(),
    }


def _counted(group: Group) -> np.ndarray:
    """bool [T]: the tokens that the policy chose in valid completions."""
    valid = [not verdict.error for verdict in group.verdicts]
    return np.repeat(valid, group.lengths) & group.loss_mask.astype(bool)


def _queue(taken: Taken) -> Record:
    return {
        "queue_s": _mean(taken.queue_s),
        "queue_s_max": max(taken.queue_s, default=0.0),
        "kv_mixed": _mean([group.kv_mixed for group in taken.groups]),
        "buffered_groups": taken.state.buffered_groups,
        "leased_groups": taken.state.leased_groups,
        "generators": len(taken.state.generators),
    } | _transfer(taken.state.slowest)


def _transfer(slowest: Applied | None) -> Record:
    if slowest is None:
        return {}
    return {
        "transfer_s": slowest.stage_s,
        "transfer_bytes": slowest.num_bytes,
        "transfer_link_share": slowest.link_share,
        "pause_s": slowest.pause_s,
    }


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0


# ---- pace ----------------------------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """Running totals at the end of a step, or what two of them differ by."""

    wall_s: float
    waited_s: float  # of wall_s, by the learner for its groups
    trained_tokens: int
    generated_tokens: int
    busy_s: float  # sampling, summed over generators
    idle_s: float  # with nothing to sample, summed over generators

    def since(self, earlier: "Totals") -> "Totals":
        return Totals._make(map(sub, self, earlier))

    @property
    def learner_idle(self) -> float:
        return _ratio(self.waited_s, self.wall_s)

    @property
    def generator_idle(self) -> float:
        return _ratio(self.idle_s, self.busy_s + self.idle_s)


class Pace:
    """Both sides' speed and idle share from its making on. `clock` counts seconds.

    Shares and rates of a step cover the last `WINDOW_S` seconds, or the last step where that took longer. A
    generator's counters are those of its last heartbeat, so its rate is taken over its own time, not the learner's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._started_s = clock()
        self._first: Totals | None = None  # the generators' counters are known only from the first step on
        self._recent: deque[Totals] = deque()

    def step(self, state: State, waited_s: float, trained_tokens: int) -> Record:
        """Figures of the step that ends now, whose learner waited `waited_s` for its groups."""
        generators = state.generated_tokens, state.generator_busy_s, state.generator_idle_s
        if self._first is None:
            self._first = Totals(self._started_s, 0.0, 0, *generators)
            self._recent.append(self._first)
        last = self._recent[-1]
        now = Totals(self._clock(), last.waited_s + waited_s, last.trained_tokens + trained_tokens, *generators)
        self._recent.append(now)
        while len(self._recent) > 2 and now.wall_s - self._recent[1].wall_s >= WINDOW_S:
            self._recent.popleft()
        recent = now.since(self._recent[0])
        return {
            "step_s": now.wall_s - last.wall_s,
            "wait_s": waited_s,
            "trained_tokens": trained_tokens,
            "generated_tokens": state.generated_tokens,
            "generator_busy_s": state.generator_busy_s,
            "generator_idle_s": state.generator_idle_s,
            "learner_idle": recent.learner_idle,
            "generator_idle": recent.generator_idle,
            "trained_tokens_per_s": _ratio(recent.trained_tokens, recent.wall_s),
            "generated_tokens_per_s": _ratio(recent.generated_tokens, recent.busy_s + recent.idle_s)
            * len(state.generators),
            "bottleneck": bottleneck(recent.learner_idle, recent.generator_idle),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def bottleneck(learner_idle: float, generator_idle: float) -> str:
    """One line: which side holds the job up, and what would help."""
    if learner_idle > IDLE and generator_idle > IDLE:
        return "both sides wait: raise max_staleness, or look at the rewards and the stragglers"
    if learner_idle > IDLE:
        return "generation is the bottleneck: add generators or slots"
    if generator_idle > IDLE:
        return "training is the bottleneck: add learners, or raise max_staleness"
    return "balanced"


# ---- records -------------------------------------------------------------------------------------------------------


def check_tracking(config: Config) -> None:
    """Raises `ConfigError` where [tracking] asks for a package that is not there."""
    project = config.tracking.wandb_project
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"tracking.wandb_project = {project!r}: needs the package wandb: pip install 'leeway[wandb]'")


class Recorder:
    """Writes every record to `metrics.jsonl`, its numbers to TensorBoard and, when configured, Weights & Biases."""

    def __init__(self, config: Config, path: Path, tensorboard: Path):
        self._file = path.open("ab", buffering=0)
        self._writers: list[Callable[[Numbers, int], None]] = []
        self._closers: list[Callable[[], None]] = [self._file.close]
        if config.tracking.tensorboard:
            self._open_tensorboard(tensorboard)
        if config.tracking.wandb_project:
            self._open_wandb(config, path.parent)

    def _open_tensorboard(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory))

        def write(numbers: Numbers, step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self._writers.append(write)
        self._closers.append(writer.close)

    def _open_wandb(self, config: Config, directory: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(
            project=config.tracking.wandb_project,
            name=directory.name,
            dir=str(directory),
            config=msgspec.to_builtins(config),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")  # its own count takes no row of a step that has passed
        self._writers.append(lambda numbers, step: run.log({**numbers, "step": step}))
        self._closers.append(run.finish)

    def record(self, record: Record) -> None:
        """`record` has `kind` and `step` beside its figures; one that is not a number is written as null."""
        self._file.write(msgspec.json.encode({"time": time.time(), **record}) + b"\n")
        kind, step = record["kind"], record["step"]
        numbers = {f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for write in self._writers:
            write(numbers, step)

    def close(self) -> None:
        """Safe to call twice."""
        while self._closers:
            self._closers.pop()()


def share(mean: float | None, stderr: float | None) -> str:
    """A mean in per cent with its standard error, where there is one: a single prompt has none."""
    if mean is None or math.isnan(mean):
        return "nothing judged"
    return f"{mean:.1%}" + ("" if stderr is None or math.isnan(stderr) else f" ± {stderr:.1%}")


def evaluation_record(evaluation: Evaluation, step: int) -> Record:
    """A row of `metrics.jsonl` for an evaluation."""
    figures = {
        f"{figure}/{domain}": value
        for domain, score in evaluation.scores.items()
        for figure, value in msgspec.structs.asdict(score).items()
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

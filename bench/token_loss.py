"""Is the token loss from logits faster? python bench/token_loss.py [--device cpu|cuda] [--quick]

loss       log-probability, entropy, PPO's clipped loss and the gradient by the logits, V = 151,936
statistics log-probability and entropy alone, as for the old and the reference policy
accuracy   of both, in the logits' type

Beside it stand torch as one writes it down, the same under torch.compile, the ways of TRL (row by row, to save memory)
and verl (entropy in chunks), and on CUDA Liger's Triton kernel, where it is installed, and a copy of the same bytes.

On the CPU the metric counts processor time, so that other processes hit all alike; rounds are interleaved.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from engine.ops.loss import Recipe, Tokens, row_stats, token_loss, token_loss_  # noqa: E402

VOCAB = 151_936
LOW, HIGH = 0.2, 0.28
RECIPE = Recipe(("ppo_clip", (LOW, HIGH, float("nan"))))
CHUNK = 2048  # rows, of verl's entropy


@dataclass(frozen=True)
class Batch:
    """Tokens of one completion, their policy a little away from the one that sampled them."""

    logits: Tensor
    targets: Tensor
    tokens: Tokens

    @classmethod
    def random(cls, num_tokens: int, dtype: torch.dtype, device: str) -> "Batch":
        generator = torch.Generator(device).manual_seed(0)
        options = {"device": device, "generator": generator}
        logits = torch.empty(num_tokens, VOCAB, dtype=dtype, device=device)
        for rows in logits.split(CHUNK):
            rows.copy_(3 * torch.randn(rows.shape, **options))
        targets = torch.randint(VOCAB, (num_tokens,), **options)
        behaviour = row_stats(logits, targets)[0] + 0.1 * torch.randn(num_tokens, **options)
        mask = torch.ones(num_tokens, device=device)
        cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
        advantage = torch.randn(num_tokens, **options)
        return cls(logits, targets, Tokens(behaviour, advantage, mask, mask / num_tokens, cu_seqlens))


# ---- Log-probability and entropy, as they are written elsewhere


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


def row_by_row(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's way: nothing is kept of a row but what is asked."""
    stats = [plain(row[None], target[None]) for row, target in zip(logits, targets, strict=True)]
    logprob, entropy = zip(*stats, strict=True)
    return torch.cat(logprob), torch.cat(entropy)


def in_chunks(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """verl's way: log-probabilities from the log-sum-exp, then the entropy of a chunk of rows at a time."""
    lse = torch.stack([row.float().logsumexp(-1) for row in logits])
    logprob = logits.gather(-1, targets[:, None])[:, 0].float() - lse
    with torch.no_grad():
        chunks = [rows.float() for rows in logits.split(CHUNK)]
        entropy = [z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1) for z in chunks]
    return logprob, torch.cat(entropy)


# ---- The loss and its gradient

Stats = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # log-probability and entropy first
Loss = Callable[[Tensor, Batch], Tensor]


def clipped(stats: Stats, logits: Tensor, batch: Batch) -> Tensor:
    tokens = batch.tokens
    logprob = stats(logits, batch.targets)[0]
    ratio = (logprob - tokens.behaviour).exp()
    held = ratio.clamp(1 - LOW, 1 + HIGH)
    return (tokens.omega * torch.maximum(-tokens.advantage * ratio, -tokens.advantage * held)).sum()


def ours(logits: Tensor, batch: Batch) -> Tensor:
    return token_loss(logits, batch.targets, batch.tokens, RECIPE).loss


def liger(logits: Tensor, batch: Batch) -> Tensor:
    """One advantage for all tokens, and the last row left out: its kernel knows no other way."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss  # pyright: ignore[reportMissingImports]

    tokens, options = batch.tokens, {"temperature": 1.0, "beta": 0.0, "eps_low": LOW, "eps_high": HIGH}
    behaviour, targets = tokens.behaviour[None, :-1], batch.targets[None, :-1]
    loss = triton_grpo_loss(logits[None], behaviour, None, targets, tokens.advantage[:1], inplace=False, **options)
    return (tokens.omega[None, :-1] * loss[0]).sum()


def gradient(loss: Loss, batch: Batch) -> Tensor:
    logits = batch.logits.detach().requires_grad_()
    return torch.autograd.grad(loss(logits, batch), logits)[0]


def computed(stats: Stats, loss: Loss, batch: Batch) -> dict[str, Tensor]:
    logprob, entropy = stats(batch.logits, batch.targets)[:2]
    return {"log-probability": logprob, "entropy": entropy, "gradient": gradient(loss, batch)}


def accuracy(case: str, batch: Batch) -> list[dict]:
    """Rows of 1 / error, relative and against float64."""
    tokens = {name: t.double() for name, t in vars(batch.tokens).items() if name in ("behaviour", "advantage", "omega")}
    exact = Batch(batch.logits.double(), batch.targets, replace(batch.tokens, **tokens))
    eager = partial(clipped, plain)
    truth, theirs = computed(plain, eager, exact), computed(plain, eager, batch)
    mine = computed(row_stats, ours, batch)
    rows = []
    for name, true in truth.items():
        my, their = ([(true.norm() / (true - values[name]).norm()).item()] for values in (mine, theirs))
        rows.append(results.row(case, f"1 / error of {name}", my, their, "torch eager", None))
    return rows


# ---- Measuring


@dataclass(frozen=True)
class Arm:
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def seconds(arm: Arm, device: str) -> float:
    arm.prepare()
    if device == "cpu":
        begin = time.process_time()
        arm.run()
        return time.process_time() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    arm.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def rounds_of(arms: dict[str, Arm], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every arm, one round of all after the other. What came before the rounds warmed up."""
    for arm in arms.values():
        seconds(arm, device)
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            figures[name].append(seconds(arm, device))
    return figures


def loss_arms(batch: Batch, device: str, quick: bool) -> dict[str, Arm]:
    eager = partial(clipped, plain)
    losses: dict[str, Loss] = {OURS: ours, "torch eager": eager, "TRL's way": partial(clipped, row_by_row)}
    if not quick:
        losses["torch.compile"] = torch.compile(eager)
    if device == "cuda" and find_spec("liger_kernel"):
        losses["Liger"] = liger
    arms = {name: Arm(partial(gradient, loss, batch)) for name, loss in losses.items()}
    spare = torch.empty_like(batch.logits)
    arms[IN_PLACE] = Arm(
        lambda: token_loss_(spare, batch.targets, batch.tokens, RECIPE), lambda: spare.copy_(batch.logits)
    )
    return arms | {COPY: Arm(lambda: spare.copy_(batch.logits))}


def statistics_arms(batch: Batch, device: str, quick: bool) -> dict[str, Arm]:
    ways: dict[str, Stats] = {"torch eager": plain, "verl's way": in_chunks}
    if not quick:
        ways["torch.compile"] = torch.compile(plain)
    arms = {OURS: Arm(partial(row_stats, batch.logits, batch.targets))}
    arms |= {name: Arm(torch.no_grad()(partial(way, batch.logits, batch.targets))) for name, way in ways.items()}
    spare = torch.empty_like(batch.logits)
    return arms | {COPY: Arm(lambda: spare.copy_(batch.logits))}


# ---- What was claimed

OURS, IN_PLACE, COPY = "ours", "ours, in place", "copy"
GOALS = {
    ("loss", "cpu"): {"torch eager": 5.0, "torch.compile": 2.0},
    ("loss", "cuda"): {COPY: 0.85, "Liger": 1.5},
    ("statistics", "cpu"): {"torch eager": 10.0},
    ("statistics", "cuda"): {COPY: 0.9},
}
PASSES = {"loss": 2, "statistics": 1}  # over the logits' bytes, to read or to write; of a copy 2


def rows_of(kind: str, case: str, figures: dict[str, list[float]], batch: Batch, device: str) -> list[dict]:
    goals, num_tokens = GOALS[kind, device], len(batch.targets)
    peers = [name for name in figures if name not in (OURS, IN_PLACE, COPY)]
    rows = []
    for arm in [name for name in (OURS, IN_PLACE) if name in figures]:
        name = case + arm.removeprefix(OURS)
        mine = [num_tokens / taken for taken in figures[arm]]
        for peer in peers:
            theirs = [num_tokens / taken for taken in figures[peer]]
            rows.append(results.row(name, UNITS[device], mine, theirs, peer, goals.get(peer)))
        if device == "cuda":
            gigabytes = batch.logits.nbytes / 1e9
            moved = [PASSES[kind] * gigabytes / taken for taken in figures[arm]]
            copied = [2 * gigabytes / taken for taken in figures[COPY]]
            rows.append(results.row(name, "GB/s", moved, copied, COPY, goals.get(COPY)))
    return rows


UNITS = {"cpu": "tokens/cpu_s", "cuda": "tokens/s"}
SIZES = {"cpu": 96, "cuda": 8192}  # tokens; on CUDA torch eager takes 60 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="bfloat16, without torch.compile")
    options = parser.parse_args()
    num_tokens, rounds = SIZES[options.device], 3 if options.quick else 9
    rows = []
    for dtype in (torch.bfloat16,) if options.quick else (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rows += accuracy(f"accuracy, {name}", Batch.random(8, dtype, options.device))
        batch = Batch.random(num_tokens, dtype, options.device)
        for kind, arms in {"loss": loss_arms, "statistics": statistics_arms}.items():
            figures = rounds_of(arms(batch, options.device, options.quick), rounds, options.device)
            rows += rows_of(kind, f"{kind}, {name}", figures, batch, options.device)
    facts = {"num_tokens": num_tokens, "vocab": VOCAB, "threads": torch.get_num_threads()}
    results.keep("token_loss", options.device, rows, **facts)


if __name__ == "__main__":
    main()

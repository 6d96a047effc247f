"""AdamW over a model, its clipping and the schedule of its learning rate."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine import parallel
from engine.config import Optimizer

SCHEDULES: dict[str, Callable[[float], float]] = {  # of the way from `lr_end` to `lr`, by the share of updates made
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


class NonFinite(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is infinite or not a number."""


def adamw(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over `model`; matrices decay, vectors (norms and biases) do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    for p in matrices + vectors:  # else a checkpoint before the first step makes them, having counted a step
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def learning_rate(settings: Optimizer, updates: int, total: int) -> float:
    """The rate of the update after `updates` ones: a linear rise over `warmup_steps`, then the schedule to `lr_end` at
    `total`."""
    if updates < settings.warmup_steps:
        return settings.lr * (updates + 1) / settings.warmup_steps
    progress = (updates - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.lr_end + (settings.lr - settings.lr_end) * SCHEDULES[settings.schedule](min(1.0, progress))


def gradients(model: nn.Module) -> list[Tensor]:
    """This rank's parts of the gradients."""
    return [parallel.shards(p.grad) for p in model.parameters() if p.grad is not None]


def square_norm(gradients: list[Tensor]) -> Tensor:
    """float64 scalar: this rank's part of the square of their norm."""
    return torch.nn.utils.get_total_norm(gradients).double().square()


def descend(
    optimizer: torch.optim.Optimizer, gradients: list[Tensor], norm: float, clip_norm: float, rate: float
) -> None:
    """One step at `rate`, the gradients scaled down to `clip_norm` where their `norm`, over all ranks, is above it."""
    if norm > clip_norm:
        torch._foreach_mul_(gradients, clip_norm / norm)  # pyright: ignore[reportPrivateImportUsage]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()

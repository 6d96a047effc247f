"""Are generalised advantages faster? python bench/gae.py [--device cpu|cuda] [--quick]

64 sequences of 16,384 tokens, with a lambda of its own for each sequence, for the critic and for the policy. Ours takes
them packed and lets observations pass; beside it stand, on padded rows and both lambdas at a time, the loop over
time as it is commonly written, and a scan by doubling that torch can vectorise (it knows no observations).

On the CPU the metric counts processor time, so that other processes hit all alike; rounds are interleaved.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from bench.rounds import rounds_of  # noqa: E402
from engine.ops.packing import gae  # noqa: E402

NUM_SEQUENCES, LENGTH = 64, 16384
GAMMA = 0.999
MOST_SECONDS = 20e-6  # on a GPU


def loop_over_time(rewards: Tensor, values: Tensor, mask: Tensor, lambdas: Tensor) -> Tensor:
    """[2, S, T]: advantages of both lambdas [2, S]."""
    following, carry, backwards = torch.zeros_like(values[:, 0]), torch.zeros_like(lambdas), []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        moved = delta + GAMMA * lambdas * carry
        following = values[:, t] * mask[:, t] + (1 - mask[:, t]) * following
        carry = moved * mask[:, t] + (1 - mask[:, t]) * carry
        backwards.append(carry)
    return torch.stack(backwards[::-1], -1)


def doubling(rewards: Tensor, values: Tensor, lambdas: Tensor) -> Tensor:
    """A_t = sum of (gamma lambda)^k delta_(t+k), over 1, 2, 4, ... terms."""
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    sums = (rewards + GAMMA * following - values).expand(2, -1, -1).clone()
    decay, step = (GAMMA * lambdas)[..., None], 1
    while step < sums.shape[-1]:
        sums[..., :-step] += decay**step * sums[..., step:].clone()
        step *= 2
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="three rounds instead of nine")
    options = parser.parse_args()
    device, num_tokens = options.device, NUM_SEQUENCES * LENGTH
    random = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, NUM_SEQUENCES, LENGTH, generator=random, device=device)
    lambdas = 1 - 0.1 * torch.rand(2, NUM_SEQUENCES, generator=random, device=device)
    mask, nothing = torch.ones_like(values), torch.zeros(NUM_SEQUENCES, device=device)
    cu_seqlens = torch.arange(NUM_SEQUENCES + 1, dtype=torch.int32, device=device) * LENGTH
    packed = [each.flatten() for each in (rewards, values, mask)]
    arms = {
        "ours": partial(
            gae, *packed, cu_seqlens, nothing, gamma=GAMMA, lambda_critic=lambdas[0], lambda_policy=lambdas[1]
        ),
        "loop over time": partial(loop_over_time, rewards, values, mask, lambdas),
        "doubling, torch": partial(doubling, rewards, values, lambdas),
    }
    expected = arms["loop over time"]()
    advantages, returns = arms["ours"]()
    for theirs in (expected, arms["doubling, torch"]()):
        torch.testing.assert_close(advantages.view_as(values), theirs[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(returns.view_as(values) - values, theirs[0], rtol=1e-3, atol=1e-3)

    figures = rounds_of(arms, 3 if options.quick else 9, device)
    mine = [num_tokens / taken for taken in figures.pop("ours")]
    unit = "tokens/cpu_s" if device == "cpu" else "tokens/s"
    goals = {"loop over time": 100.0}
    rows = [
        results.row("64 x 16,384", unit, mine, [num_tokens / taken for taken in theirs], name, goals.get(name))
        for name, theirs in figures.items()
    ]
    if device == "cuda":
        alone = rounds_of({"ours": arms["ours"]}, 9, device, repeat=50)["ours"]
        limit = [num_tokens / MOST_SECONDS] * len(alone)
        rows.append(results.row("64 x 16,384", unit, [num_tokens / taken for taken in alone], limit, "20 us", 1.0))
    results.keep("gae", device, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

"""Importance weights that carry the tokens from the behaviour policy to the proximal policy.

With rho = pi_proximal / pi_behaviour, each function takes the log-probabilities of the two policies [N] and the
completions that the tokens form, and returns the weight w [N] of each token's surrogate, without a gradient.

A method that corrects recomputes the proximal policy's log-probabilities with the learner's own weights and so removes
both the staleness and the engine's numerical mismatch from the ratio that the surrogate clips. One that does not takes
the behaviour policy as proximal.
"""

import torch
from torch import Tensor

from engine.algorithms.ratios import ratio, sequence_ratio
from engine.algorithms.segments import Segments
from engine.algorithms.slots import FromOne, UpToOne


def none(proximal: Tensor, behaviour: Tensor, completions: Segments) -> Tensor:
    """w = 1: the surrogate's own ratio, against the behaviour policy, is all the importance weighting there is."""
    return torch.ones_like(proximal)


def decoupled(proximal: Tensor, behaviour: Tensor, completions: Segments) -> Tensor:
    """w = rho. Decoupled PPO, arXiv:2110.00641; in asynchronous training of language models, arXiv:2505.24298."""
    return ratio(proximal, behaviour).detach()


def tis(proximal: Tensor, behaviour: Tensor, completions: Segments, *, cap: FromOne = 2.0) -> Tensor:
    """w = min(rho, cap): truncated importance sampling, a little bias for a bounded variance."""
    return ratio(proximal, behaviour).clamp(max=cap).detach()


def icepop(
    proximal: Tensor, behaviour: Tensor, completions: Segments, *, low: UpToOne = 0.5, high: FromOne = 5.0
) -> Tensor:
    """w = rho where low <= rho <= high, else 0: tokens on which the two policies disagree do not train.

    IcePop, in Ring-1T, arXiv:2510.18855.
    """
    rho = ratio(proximal, behaviour)
    return torch.where((rho >= low) & (rho <= high), rho, 0.0).detach()


def sequence(
    proximal: Tensor, behaviour: Tensor, completions: Segments, *, cap: FromOne = 2.0, geometric: bool = False
) -> Tensor:
    """w = min(s, cap), s the product of rho over the completion's tokens, or their geometric mean: one a completion.

    The product is the completion's true importance weight; the geometric mean does not grow with its length.
    """
    s = sequence_ratio(proximal, behaviour, completions, geometric=geometric)
    return completions.spread(s.clamp(max=cap)).detach()


def sequence_mask(
    proximal: Tensor,
    behaviour: Tensor,
    completions: Segments,
    *,
    low: UpToOne = 0.5,
    high: FromOne = 2.0,
    geometric: bool = False,
) -> Tensor:
    """w = s where low <= s <= high, else 0, s as in `sequence`: completions in disagreement do not train at all.

    The aggregate still counts their tokens, so that the others do not become louder.
    """
    s = sequence_ratio(proximal, behaviour, completions, geometric=geometric)
    return completions.spread(torch.where((s >= low) & (s <= high), s, 0.0)).detach()


CORRECTIONS = {
    "none": none,
    "decoupled": decoupled,
    "tis": tis,
    "icepop": icepop,
    "sequence": sequence,
    "sequence_mask": sequence_mask,
}

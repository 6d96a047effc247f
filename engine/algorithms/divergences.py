"""Penalties on the distance from a frozen reference policy, from the sampled token alone.

With d = log pi - log pi_ref, each function takes the two log-probabilities [N] and returns coefficient * k(d) [N]. Over
tokens sampled by pi, k1 and k3 average to KL(pi, pi_ref). What trains, however, is the average of k'(d) grad log pi,
and there the three part ways. Estimators: Schulman, "Approximating KL divergence", 2020.
"""

import torch
from torch import Tensor

from engine.algorithms.ratios import bounded
from engine.algorithms.slots import NonNegative


def k1(logprob: Tensor, reference: Tensor, *, coefficient: NonNegative) -> Tensor:
    """k = d, k' = 1. Unbiased as an estimate; as a loss it does nothing on average but add noise."""
    return coefficient * (logprob - reference)


def k2(logprob: Tensor, reference: Tensor, *, coefficient: NonNegative) -> Tensor:
    """k = d^2 / 2, k' = d. Biased as an estimate; its gradient is that of KL(pi, pi_ref)."""
    return coefficient * (logprob - reference).square() / 2


def k3(logprob: Tensor, reference: Tensor, *, coefficient: NonNegative) -> Tensor:
    """k = exp(-d) - 1 + d, k' = 1 - exp(-d). Unbiased and never negative; its gradient is that of KL(pi_ref, pi).

    GRPO, arXiv:2402.03300.
    """
    d = bounded(logprob - reference)
    return coefficient * (torch.expm1(-d) + d)


DIVERGENCES = {"k1": k1, "k2": k2, "k3": k3}

"""Penalties on the distance from a frozen reference policy, from the sampled token alone.

With d = log pi - log pi_ref, each function takes the log-probabilities of the policy (with gradient), of the reference
and of the proximal policy [N] and returns coefficient * k(d) [N]. Over tokens sampled by pi, k1 and k3 average to
KL(pi, pi_ref). What trains, however, is the average of k'(d) grad log pi, and there the three part ways.

`corrected` multiplies k by r = pi / pi_proximal, gradient included. Over tokens sampled by the proximal policy, the
penalty then averages to what it is over the policy's own, and its gradient to that average's. Estimators: Schulman,
"Approximating KL divergence", 2020; the correction: DeepSeek-V3.2, arXiv:2512.02556.
"""

import torch
from torch import Tensor

from engine.algorithms.ratios import bounded, ratio
from engine.algorithms.slots import NonNegative


def k1(
    logprob: Tensor, reference: Tensor, proximal: Tensor, *, coefficient: NonNegative, corrected: bool = False
) -> Tensor:
    """k = d, k' = 1; corrected, k' = r (d + 1).

    Unbiased as an estimate; as a loss it does nothing on average but add noise, unless corrected.
    """
    return coefficient * _carried(logprob - reference, logprob, proximal, corrected)


def k2(
    logprob: Tensor, reference: Tensor, proximal: Tensor, *, coefficient: NonNegative, corrected: bool = False
) -> Tensor:
    """k = d^2 / 2, k' = d; corrected, k' = r (d^2 / 2 + d).

    Biased as an estimate; its gradient is that of KL(pi, pi_ref), uncorrected.
    """
    return coefficient * _carried((logprob - reference).square() / 2, logprob, proximal, corrected)


def k3(
    logprob: Tensor, reference: Tensor, proximal: Tensor, *, coefficient: NonNegative, corrected: bool = False
) -> Tensor:
    """k = exp(-d) - 1 + d, k' = 1 - exp(-d); corrected, k' = r d. Unbiased as an estimate and never negative.

    Its gradient is that of KL(pi_ref, pi); corrected, that of KL(pi, pi_ref). GRPO, arXiv:2402.03300.
    """
    d = bounded(logprob - reference)
    return coefficient * _carried(torch.expm1(-d) + d, logprob, proximal, corrected)


def _carried(k: Tensor, logprob: Tensor, proximal: Tensor, corrected: bool) -> Tensor:
    return k * ratio(logprob, proximal) if corrected else k


DIVERGENCES = {"k1": k1, "k2": k2, "k3": k3}

"""Probability ratios from log-probabilities."""

from torch import Tensor

LOG_LIMIT = 20.0  # e^20 = 5e8: beyond any clip, and its square is far from overflow in float32


def bounded(log_ratio: Tensor) -> Tensor:
    """`log_ratio` within +-20; no gradient beyond."""
    return log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT)


def ratio(logprob: Tensor, other: Tensor) -> Tensor:
    """pi / pi_other = exp(logprob - other), the log-ratio bounded."""
    return bounded(logprob - other).exp()

"""Probability ratios from log-probabilities."""

from torch import Tensor

from engine.algorithms.segments import Segments

LOG_LIMIT = 20.0  # e^20 = 5e8: beyond any clip, and its square is far from overflow in float32


def bounded(log_ratio: Tensor) -> Tensor:
    """`log_ratio` within +-20; no gradient beyond."""
    return log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT)


def ratio(logprob: Tensor, other: Tensor) -> Tensor:
    """pi / pi_other = exp(logprob - other), the log-ratio bounded."""
    return bounded(logprob - other).exp()


def sequence_ratio(logprob: Tensor, other: Tensor, completions: Segments, *, geometric: bool) -> Tensor:
    """[S]: the product of pi / pi_other over each completion's tokens that count, or their geometric mean."""
    log_ratio = logprob - other
    return bounded(completions.mean(log_ratio) if geometric else completions.sum(log_ratio)).exp()

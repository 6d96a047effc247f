"""A method: one function from each slot, composed into the loss that the learner minimises.

    loss = sum over tokens of  omega * (w * phi + beta * k - eta * H)

    phi    surrogate   the policy gradient's loss of a token             losses.py
    w      correction  carries behaviour to proximal policy, detached    corrections.py
    k      divergence  estimate of KL(policy, reference)                 divergences.py
    omega  aggregate   what a token counts, normalised over the update   aggregates.py
    H      entropy of the token's distribution

Three policies meet in it. The behaviour policy sampled the tokens, at whatever version each was sampled. The proximal
policy is the learner's own at the start of the step; surrogates take their ratio against it. Without a correction
there is nothing to carry from one to the other, and behaviour stands in for proximal. The reference is frozen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.algorithms.advantages import ADVANTAGES
from engine.algorithms.aggregates import AGGREGATES
from engine.algorithms.corrections import CORRECTIONS
from engine.algorithms.divergences import DIVERGENCES
from engine.algorithms.losses import LOSSES
from engine.algorithms.ratios import ratio
from engine.algorithms.segments import Segments
from engine.algorithms.slots import bind
from engine.config import Algorithm


@dataclass(frozen=True)
class Tokens:
    """What is known of a micro-batch's N target tokens, in S completions, before the policy sees them: no gradients.

    `proximal` may be left out where the policy is the proximal one itself: in the first update of a step.
    `reference` is needed where `Method.needs_reference`.
    """

    behaviour: Tensor  # float [N]: log-probability under the version that sampled the token
    advantage: Tensor  # float [N]
    mask: Tensor  # float [N]: 0 for tokens that do not train (observations, stale ones)
    sequence: Tensor  # int64 [N]: the completion, 0..S-1, that a token belongs to; completions are never split
    lengths: Tensor  # int64 [S]: tokens of each completion that train, stale ones included
    proximal: Tensor | None = None  # float [N]
    reference: Tensor | None = None  # float [N]


@dataclass(frozen=True)
class Method:
    """The composed algorithm; made by `compose`."""

    advantages: Callable[[Tensor, Tensor], Tensor]  # (rewards [S], group int64 [S]) -> [S]
    correction: Callable[..., Tensor]
    surrogate: Callable[..., tuple[Tensor, Tensor]]
    aggregate: Callable[..., Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]
    kl_coefficient: float
    entropy_coefficient: float
    needs_proximal: bool  # the learner's log-probabilities at the start of the step

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient != 0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coefficient != 0

    def loss(
        self, logprob: Tensor, entropy: Tensor | None, tokens: Tokens, *, num_tokens: int, num_sequences: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and its health, as sums: both add up over micro-batches and ranks.

        `logprob` [N] and `entropy` [N] carry gradients; entropy may be None unless `needs_entropy`. `num_tokens` and
        `num_sequences` count the whole update, on all ranks, stale tokens included: so the update's loss and gradient
        do not depend on how its completions fell into micro-batches. `means` reads the sums.
        """
        raise NotImplementedError


def compose(config: Algorithm) -> Method:
    """The method that a configuration names. Raises `ConfigError` for an unknown name, key or value."""
    raise NotImplementedError


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Figures per token from the sums of `Method.loss`, added over micro-batches and ranks."""
    raise NotImplementedError

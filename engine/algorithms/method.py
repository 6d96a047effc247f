"""A method: one function from each slot, composed into the loss that the learner minimises.

    loss = sum over tokens of  omega * (w * phi + beta * k - eta * H)  -  mu * mean log pi of solved completions' tokens

    phi    surrogate   the policy gradient's loss of a token             losses.py
    w      correction  carries behaviour to proximal policy, detached    corrections.py
    k      divergence  estimate of KL(policy, reference)                 divergences.py
    omega  aggregate   what a token counts, normalised over the update   aggregates.py
    H      entropy of the token's distribution
    mu     weight of the likelihood of what was right: VAPO, arXiv:2504.05118, sec. 4.3

Three policies meet in it. The behaviour policy sampled the tokens, at whatever version each was sampled. The proximal
policy is the learner's own at the start of the step; surrogates take their ratio against it. Without a correction
there is nothing to carry from one to the other, and behaviour stands in for proximal. The reference is frozen.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.algorithms.advantages import ADVANTAGES, BY_SEGMENT, BY_TOKEN
from engine.algorithms.aggregates import AGGREGATES
from engine.algorithms.corrections import CORRECTIONS, none
from engine.algorithms.divergences import DIVERGENCES, k1
from engine.algorithms.losses import LOSSES, Surrogate
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
    staleness: Tensor | None = None  # int32 [N]: the learner's version less the token's; for `mismatch` alone
    moved: bool = False  # the policy was updated since its version was made: no token is its own any more
    solved: Tensor | None = None  # float [N]: 1 / tokens of solved completions in the update for those tokens, else 0

    def completions(self, dtype: torch.dtype) -> Segments:
        return Segments(self.sequence, self.mask.to(dtype), len(self.lengths))


@dataclass(frozen=True)
class Method:
    """One function from each slot, with its hyper-parameters bound; made by `compose`."""

    advantages: Callable[..., Any]  # see engine.algorithms.advantages
    correction: Callable[[Tensor, Tensor, Segments], Tensor]
    surrogate: Callable[[Tensor, Tensor, Tensor, Segments], Surrogate]
    aggregate: Callable[[Segments, Tensor, int, int], Tensor]
    divergence: Callable[[Tensor, Tensor, Tensor], Tensor]
    kl_coefficient: float  # beta, which `divergence` has multiplied in
    entropy_coefficient: float  # eta
    imitation_coefficient: float  # mu
    needs_proximal: bool  # the learner's own log-probabilities at the start of the step
    needs_segments: bool  # advantages are by segment
    needs_critic: bool  # advantages are by token, from a critic's values

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
        completions = tokens.completions(logprob.dtype)
        proximal = self._proximal(logprob, tokens)

        phi, clipped = self.surrogate(logprob, proximal, tokens.advantage, completions)
        w = self.correction(proximal, tokens.behaviour, completions)
        omega = self.aggregate(completions, tokens.lengths, num_tokens, num_sequences)
        penalised = w * phi
        health = _drift(logprob, tokens) | {"clipped": clipped, "weight": w, "rejected": w == 0}
        if self.needs_reference:
            assert tokens.reference is not None, "this method needs the reference's log-probabilities"
            beta_k = self.divergence(logprob, tokens.reference, proximal)
            penalised = penalised + beta_k
            health["kl"] = beta_k / self.kl_coefficient
        if self.needs_entropy:
            assert entropy is not None, "this method needs the entropy"
            penalised = penalised - self.entropy_coefficient * entropy
        if entropy is not None:
            health["entropy"] = entropy
        loss = (omega * penalised).sum()
        if self.imitation_coefficient != 0:
            assert tokens.solved is not None, "this method needs to know what was solved"
            imitated = -(tokens.solved * completions.mask * logprob).sum()
            loss = loss + self.imitation_coefficient * imitated
        return loss, _sums(health, completions.mask)

    def _proximal(self, logprob: Tensor, tokens: Tokens) -> Tensor:
        if not self.needs_proximal:
            return tokens.behaviour
        return logprob.detach() if tokens.proximal is None else tokens.proximal


def _drift(logprob: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled, whatever the method makes of it."""
    rho = ratio(logprob.detach(), tokens.behaviour)
    drift = (logprob.detach() - tokens.behaviour).abs()
    figures = {"drift": drift, "ratio": rho, "ratio_squared": rho.square()}
    for name, k in DIVERGENCES.items():  # of KL(behaviour, policy), as the behaviour policy sampled
        figures[f"drift_{name}"] = k(tokens.behaviour, logprob.detach(), tokens.behaviour, coefficient=1.0)
    if tokens.staleness is not None:
        own = (tokens.staleness == 0) & (not tokens.moved)
        figures |= {"own": own, "mismatch": drift * own}
    return figures


def _sums(values: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    return {"tokens": mask.sum()} | {name: (value.detach() * mask).sum() for name, value in values.items()}


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means per token of the sums of `Method.loss`, added over micro-batches and ranks; empty without tokens.

    `clipped` and `rejected` (by the correction) are shares of the tokens; `drift` is |log pi - log pi_behaviour|, and
    `mismatch` the same of the policy's own tokens, left out where there are none: it would be 0 if generator and
    learner computed alike. `drift_k1` to `drift_k3` estimate KL(pi_behaviour, pi). The effective sample size is
    (sum rho)^2 / (N sum rho^2), rho = pi / pi_behaviour: 1 on policy, 1/N at worst.
    """
    num_tokens = sums["tokens"]
    if num_tokens == 0:
        return {}
    plain = sums.keys() - {"tokens", "ratio_squared", "own", "mismatch"}
    figures = {name: total / num_tokens for name, total in sums.items() if name in plain}
    figures["effective_sample_size"] = sums["ratio"] ** 2 / (num_tokens * sums["ratio_squared"])
    if sums.get("own"):
        figures["mismatch"] = sums["mismatch"] / sums["own"]
    return figures


def compose(config: Algorithm) -> Method:
    """The method that a configuration names. Raises `ConfigError` for an unknown name or key or a value out of range.

    Warns of k1 with a coefficient and uncorrected: its gradient is noise around zero.
    """
    divergence = bind("algorithm.kl", config.kl, DIVERGENCES)
    kl_coefficient = divergence.keywords["coefficient"]
    if divergence.func is k1 and kl_coefficient != 0 and not divergence.keywords.get("corrected", False):
        line = "algorithm.kl.name = 'k1': has no gradient on average unless corrected; k2 and k3 do"
        warnings.warn(line, stacklevel=2)
    correction = bind("algorithm.correction", config.correction, CORRECTIONS)
    advantages = bind("algorithm.advantage", config.advantage, ADVANTAGES)
    return Method(
        advantages=advantages,
        correction=correction,
        surrogate=bind("algorithm.loss", config.loss, LOSSES),
        aggregate=bind("algorithm.aggregate", config.aggregate, AGGREGATES),
        divergence=divergence,
        kl_coefficient=kl_coefficient,
        entropy_coefficient=config.entropy,
        imitation_coefficient=config.imitation,
        needs_proximal=correction.func is not none,
        needs_segments=advantages.func in BY_SEGMENT.values(),
        needs_critic=advantages.func in BY_TOKEN.values(),
    )

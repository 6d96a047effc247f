"""Surrogates: the loss of a token whose gradient improves the policy.

With r = pi / pi_proximal, each function takes the log-probabilities of the policy (with gradient) and of the proximal
policy [N], the advantages A [N] and the completions that the tokens form. It returns phi [N], to be minimised, and
where clipping holds the token back [N] (bool, for the metrics). Bounds are distances from a ratio of 1.
"""

import torch
from torch import Tensor

from engine.algorithms.ratios import bounded, ratio
from engine.algorithms.segments import Segments
from engine.algorithms.slots import FromOne, NonNegative, UpToOne

Surrogate = tuple[Tensor, Tensor]


def reinforce(logprob: Tensor, proximal: Tensor, advantage: Tensor, completions: Segments) -> Surrogate:
    """phi = -A log pi; importance weighting is left to the correction."""
    return -advantage * logprob, torch.zeros_like(advantage, dtype=torch.bool)


def ppo_clip(
    logprob: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    completions: Segments,
    *,
    low: UpToOne = 0.2,
    high: NonNegative = 0.2,
    dual: FromOne | None = None,
) -> Surrogate:
    """phi = max(-A r, -A clip(r, 1 - low, 1 + high)); with `dual`, at most -A dual where A < 0.

    phi' = -A r while r <= 1 + high (A > 0) or 1 - low <= r <= dual (A < 0), else 0. PPO, arXiv:1707.06347; unequal
    bounds ("clip-higher"): DAPO, arXiv:2503.14476; dual clip: arXiv:1912.09729.
    """
    r = ratio(logprob, proximal)
    phi, clipped = _clip(r, advantage, low, high)
    if dual is None:
        return phi, clipped
    negative = advantage < 0
    return torch.where(negative, torch.minimum(phi, -advantage * dual), phi), clipped | (negative & (r > dual))


def cispo(
    logprob: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    completions: Segments,
    *,
    high: NonNegative,
    low: UpToOne = 1.0,
) -> Surrogate:
    """phi = -stop_gradient(clip(r, 1 - low, 1 + high)) A log pi: every token keeps a gradient, of bounded weight.

    phi' = -clip(r) A. The default `low` leaves small ratios as they are. CISPO, in MiniMax-M1, arXiv:2506.13585.
    """
    r = ratio(logprob, proximal).detach()
    weight = r.clamp(1 - low, 1 + high)
    return -weight * advantage * logprob, weight != r


def gspo(
    logprob: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    completions: Segments,
    *,
    low: UpToOne = 3e-4,
    high: NonNegative = 4e-4,
) -> Surrogate:
    """phi = max(-A s, -A clip(s, 1 - low, 1 + high)), s the geometric mean of r over the completion.

    A completion is clipped as a whole. d s / d log pi_t = s / n for each of its n tokens. GSPO, arXiv:2507.18071.
    """
    s = completions.spread(bounded(completions.mean(logprob - proximal)).exp())
    return _clip(s, advantage, low, high)


def gspo_token(
    logprob: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    completions: Segments,
    *,
    low: UpToOne = 3e-4,
    high: NonNegative = 4e-4,
) -> Surrogate:
    """GSPO for advantages that differ within a completion: s_t = stop_gradient(s) pi / stop_gradient(pi).

    s_t has the value of s, and phi' = -A s reaches only its own token. Where the advantage and the aggregate's weight
    are the same for all of a completion, so is the gradient of `gspo`. GSPO, arXiv:2507.18071.
    """
    s = completions.spread(bounded(completions.mean(logprob - proximal)).exp())
    return _clip(s.detach() * (logprob - logprob.detach()).exp(), advantage, low, high)


def _clip(r: Tensor, advantage: Tensor, low: float, high: float) -> Surrogate:
    """The pessimistic one of the surrogate and its clipped version."""
    free = -advantage * r
    held = -advantage * r.clamp(1 - low, 1 + high)
    return torch.maximum(free, held), held > free


LOSSES = {"reinforce": reinforce, "ppo_clip": ppo_clip, "cispo": cispo, "gspo": gspo, "gspo_token": gspo_token}

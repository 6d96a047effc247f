"""Surrogates: the loss of a token whose gradient improves the policy.

With r = pi / pi_proximal, each function takes the log-probabilities of the policy (with gradient) and of the proximal
policy [N], the advantages A [N] and the completions that the tokens form. It returns phi [N], to be minimised, and
where clipping holds the token back [N] (bool, for the metrics). Unless said otherwise, bounds are distances from a
ratio of 1.
"""

import torch
from torch import Tensor

from engine.algorithms.ratios import ratio, sequence_ratio
from engine.algorithms.segments import Segments
from engine.algorithms.slots import FromOne, NonNegative, Positive, UpToOne

Surrogate = tuple[Tensor, Tensor]


def reinforce(logprob: Tensor, proximal: Tensor, advantage: Tensor, completions: Segments) -> Surrogate:
    """phi = -A log pi; importance weighting is left to the correction."""
    return -advantage * logprob, torch.zeros_like(advantage, dtype=torch.bool)


def importance(logprob: Tensor, proximal: Tensor, advantage: Tensor, completions: Segments) -> Surrogate:
    """phi = -A r: importance sampling that nothing holds back; phi' = -A r."""
    return -advantage * ratio(logprob, proximal), torch.zeros_like(advantage, dtype=torch.bool)


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
    beyond = (advantage < 0) & (r > dual)
    return torch.where(beyond, -advantage * dual, phi), clipped | beyond


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


def icepop(
    logprob: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    completions: Segments,
    *,
    low: UpToOne = 0.5,
    high: FromOne = 5.0,
) -> Surrogate:
    """phi = -A r where low <= r <= high, else 0: tokens on which the two policies disagree do not train.

    phi' = -A r or 0 likewise. The bounds are ratios, and every token outside counts as clipped. Meant for correction
    none, where r is against the behaviour policy. IcePop, arXiv:2510.18855; this form: INTELLECT-3, arXiv:2512.16144.
    """
    r = ratio(logprob, proximal)
    dropped = (r < low) | (r > high)
    return -advantage * torch.where(dropped, 0.0, r), dropped


def dppo(
    logprob: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    completions: Segments,
    *,
    low: UpToOne = 0.2,
    high: UpToOne = 0.2,
) -> Surrogate:
    """phi = -A r, but 0 where pi - pi_proximal > high (A > 0) or < -low (A < 0).

    phi' = -A r or 0 likewise. The token's probability itself bounds the step: a ratio says little of a rare token, and
    too little of a likely one. DPPO with total variation, arXiv:2602.04879.
    """
    moved = (logprob.exp() - proximal.exp()).detach()
    dropped = ((advantage > 0) & (moved > high)) | ((advantage < 0) & (moved < -low))
    return -advantage * torch.where(dropped, 0.0, ratio(logprob, proximal)), dropped


def sapo(
    logprob: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    completions: Segments,
    *,
    positive: Positive = 1.0,
    negative: Positive = 1.05,
) -> Surrogate:
    """phi = -A 4 sigmoid(tau (r - 1)) / tau, tau = `positive` where A > 0, else `negative`: a gate instead of a clip.

    phi' = -A 4 g (1 - g) r with g the sigmoid, -A on policy and less the further r is from 1. SAPO, arXiv:2511.20347.
    """
    tau = torch.full_like(advantage, negative).masked_fill(advantage > 0, positive)
    gate = torch.sigmoid(tau * (ratio(logprob, proximal) - 1))
    return -advantage * 4 * gate / tau, torch.zeros_like(advantage, dtype=torch.bool)


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
    s = completions.spread(sequence_ratio(logprob, proximal, completions, geometric=True))
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
    s = completions.spread(sequence_ratio(logprob, proximal, completions, geometric=True))
    return _clip(s.detach() * (logprob - logprob.detach()).exp(), advantage, low, high)


def _clip(r: Tensor, advantage: Tensor, low: float, high: float) -> Surrogate:
    """The pessimistic one of the surrogate and its clipped version."""
    free = -advantage * r
    held = -advantage * r.clamp(1 - low, 1 + high)
    return torch.maximum(free, held), held > free


LOSSES = {
    "reinforce": reinforce,
    "importance": importance,
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "icepop": icepop,
    "dppo": dppo,
    "sapo": sapo,
    "gspo": gspo,
    "gspo_token": gspo_token,
}

"""How much better a completion, a segment of it or a token is than was to be expected.

`BY_COMPLETION`: from the rewards [S] of valid completions and their group, int64 [S] numbered from 0, the advantages
[S]. A group is the completions of one prompt; its members are each other's baseline.

`BY_SEGMENT`: from the scores [K] of the segments of valid completions, each segment's completion, int64 [K] rising, and
the completions' group, int64 [S], the advantages [K]. Every token of a segment gets its own.

`BY_TOKEN`: from the rewards and a critic's values [N] of packed tokens, their bounds `cu_seqlens` [S + 1] and each
completion's length in tokens [S], the advantages and the critic's targets, both [N].
"""

import torch
from torch import Tensor

from engine.algorithms.segments import Segments
from engine.algorithms.slots import Positive, Share
from engine.ops import packing


def none(rewards: Tensor, group: Tensor) -> Tensor:
    """A = r: no baseline."""
    return rewards


def group_mean(rewards: Tensor, group: Tensor) -> Tensor:
    """A = r - mean of the group.

    Dr. GRPO, arXiv:2503.20783: unlike `group_norm`, easy and hard prompts are not weighted up.
    """
    groups = _segments(rewards, group)
    return rewards - groups.spread(groups.mean(rewards))


def group_norm(rewards: Tensor, group: Tensor, *, eps: Positive = 1e-6, sample_std: bool = False) -> Tensor:
    """A = (r - mean) / (std + eps), mean and standard deviation of the group.

    The deviation is the population's (divided by n), or the sample's (by n - 1) with `sample_std`. GRPO,
    arXiv:2402.03300.
    """
    groups = _segments(rewards, group)
    centred = rewards - groups.spread(groups.mean(rewards))
    count = groups.sum(torch.ones_like(rewards))
    variance = groups.sum(centred.square()) / (count - 1 if sample_std else count).clamp(min=1)
    return centred / (groups.spread(variance.sqrt()) + eps)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """A = r - mean of the group's others = n / (n - 1) * (r - mean); 0 in a group of one.

    The baseline does not depend on the completion that it judges, so the policy gradient stays unbiased. RLOO,
    arXiv:2402.14740.
    """
    groups = _segments(rewards, group)
    count = groups.sum(torch.ones_like(rewards))
    centred = rewards - groups.spread(groups.mean(rewards))
    return centred * groups.spread(count / (count - 1).clamp(min=1))


def batch_norm(rewards: Tensor, group: Tensor, *, eps: Positive = 1e-6) -> Tensor:
    """A = (r - mean) / (std + eps), mean and standard deviation (the population's) of all completions of the take.

    No group decides alone how loud it is. REINFORCE++, arXiv:2501.03262.
    """
    return _normalised(rewards, eps)


def group_mean_batch_norm(rewards: Tensor, group: Tensor, *, eps: Positive = 1e-6) -> Tensor:
    """`batch_norm` of r - mean of the group. REINFORCE++ with the group's mean as baseline, arXiv:2501.03262."""
    return _normalised(group_mean(rewards, group), eps)


def _normalised(values: Tensor, eps: float) -> Tensor:
    centred = values - values.mean()
    return centred / (centred.square().mean().sqrt() + eps)


def _segments(rewards: Tensor, group: Tensor) -> Segments:
    num_groups = int(group.max()) + 1 if len(group) else 0
    return Segments(group, torch.ones_like(rewards), num_groups)


# ---- by segment --------------------------------------------------------------------------------------------------


def process_delta(scores: Tensor, completion: Tensor, group: Tensor) -> Tensor:
    """A_t = s_t - s_(t-1); A_1 = s_1 - s_T: what a segment adds. They sum to 0; a single segment has 0.

    ExpRL's process reward as its paper states it, arXiv:2606.17024, eq. 2.
    """
    first, last = _ends(completion)
    before = torch.where(first, scores[_last_of(last, completion)], scores.roll(1))
    return scores - before


def process_delta_bonus(scores: Tensor, completion: Tensor, group: Tensor) -> Tensor:
    """`process_delta`, but A_1 = s_1 for a completion of one segment: it gains by not being divided.

    The released code of arXiv:2606.17024, which differs from the paper in this.
    """
    first, last = _ends(completion)
    return torch.where(first & last, scores, process_delta(scores, completion, group))


def process_end(scores: Tensor, completion: Tensor, group: Tensor) -> Tensor:
    """A_t = s_t - s_T. An ablation of arXiv:2606.17024."""
    _, last = _ends(completion)
    return scores - scores[_last_of(last, completion)]


def process_group(scores: Tensor, completion: Tensor, group: Tensor) -> Tensor:
    """A_t = s_t - mean of all segments of the group. An ablation of arXiv:2606.17024."""
    return group_mean(scores, group[completion])


def _ends(completion: Tensor) -> tuple[Tensor, Tensor]:
    """bool [K] each: the first and the last segment of a completion."""
    changes = completion.diff() != 0
    edge = changes.new_ones(min(1, len(completion)))
    return torch.cat([edge, changes]), torch.cat([changes, edge])


def _last_of(last: Tensor, completion: Tensor) -> Tensor:
    """int64 [K]: the place of the last segment of each segment's completion."""
    places = last.nonzero().squeeze(1)
    return places[completion.unique_consecutive(return_inverse=True)[1]]


# ---- by token ----------------------------------------------------------------------------------------------------


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    *,
    gamma: Share = 1.0,
    lambda_critic: Share = 1.0,
    lambda_policy: Share = 0.95,
) -> tuple[Tensor, Tensor]:
    """A_t = sum over k of (gamma lambda_policy)^k delta_(t+k), with delta_t = r_t + gamma V_(t+1) - V_t.

    V is 0 behind the end. The critic's target is V_t + the same sum with `lambda_critic`: at 1 the return itself.
    arXiv:1506.02438; a lambda for each of the two: VC-PPO, arXiv:2503.01491.
    """
    policy = torch.full_like(lengths, lambda_policy, dtype=values.dtype)
    return _gae(rewards, values, cu_seqlens, gamma, lambda_critic, policy)


def gae_length_adaptive(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    *,
    alpha: Positive = 0.05,
    gamma: Share = 1.0,
    lambda_critic: Share = 1.0,
) -> tuple[Tensor, Tensor]:
    """`gae` with lambda_policy = 1 - 1 / max(alpha * length, 1), so that the weights sum to alpha * length.

    0 for completions of up to 1 / alpha tokens. VAPO, arXiv:2504.05118.
    """
    return _gae(rewards, values, cu_seqlens, gamma, lambda_critic, adaptive_lambda(lengths, alpha).to(values.dtype))


def adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """float64 [S]: 1 - 1 / max(alpha * length, 1)."""
    return 1 - 1 / (alpha * lengths.double()).clamp(min=1)


def _gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lambda_critic: float, lambda_policy: Tensor
) -> tuple[Tensor, Tensor]:
    critic = torch.full_like(lambda_policy, lambda_critic)
    bounds = {"mask": None, "cu_seqlens": cu_seqlens, "bootstrap": None}
    return packing.gae(rewards, values, **bounds, gamma=gamma, lambda_critic=critic, lambda_policy=lambda_policy)


BY_COMPLETION = {
    "none": none,
    "group_mean": group_mean,
    "group_norm": group_norm,
    "leave_one_out": leave_one_out,
    "batch_norm": batch_norm,
    "group_mean_batch_norm": group_mean_batch_norm,
}
BY_SEGMENT = {
    "process_delta": process_delta,
    "process_delta_bonus": process_delta_bonus,
    "process_end": process_end,
    "process_group": process_group,
}
BY_TOKEN = {"gae": gae, "gae_length_adaptive": gae_length_adaptive}
ADVANTAGES = BY_COMPLETION | BY_SEGMENT | BY_TOKEN

"""How much better a completion is than was to be expected.

Each function takes the rewards [S] of valid completions and their group, int64 [S] numbered from 0, and returns the
advantages [S]. A group is the completions of one prompt; its members are each other's baseline.
"""

import torch
from torch import Tensor

from engine.algorithms.segments import Segments
from engine.algorithms.slots import Positive


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


ADVANTAGES = {
    "none": none,
    "group_mean": group_mean,
    "group_norm": group_norm,
    "leave_one_out": leave_one_out,
    "batch_norm": batch_norm,
    "group_mean_batch_norm": group_mean_batch_norm,
}

"""Credit assignment: the scores of whole groups become advantages of completions, segments or tokens."""

import numpy as np
import torch

from engine.algorithms.method import Method
from engine.schema import Group
from engine.scores import Shape


def advantages(method: Method, shape: Shape, groups: list[Group]) -> list[np.ndarray]:
    """float32 for each group: the advantage of every completion [num_samples]; where the method's are by segment, of
    every token [T]; where they are a critic's to make, the reward of every token [T].

    Completions without a valid verdict take no part in their group's baseline; theirs is 0, and the packer leaves
    them out.
    """
    if method.needs_critic:
        return [token_rewards(group, shape(group)) for group in groups]
    valid = [np.array([not verdict.error for verdict in group.verdicts], bool) for group in groups]
    scores = np.concatenate([shape(group)[kept] for group, kept in zip(groups, valid, strict=True)])
    sizes = [int(kept.sum()) for kept in valid]
    number = np.repeat(np.arange(len(groups)), sizes)
    values = method.advantages(torch.from_numpy(scores), torch.from_numpy(number)).float().numpy()
    result = [np.zeros(len(kept), np.float32) for kept in valid]
    for advantage, kept, mine in zip(result, valid, np.split(values, np.cumsum(sizes[:-1])), strict=True):
        advantage[kept] = mine
    return result


def token_rewards(group: Group, scores: np.ndarray) -> np.ndarray:
    """float32 [T]: each completion's score at its last token that the policy chose, 0 at the others."""
    rewards = np.zeros(len(group.token_ids), np.float32)
    chosen = np.flatnonzero(group.loss_mask)
    completion = np.repeat(np.arange(group.num_samples), group.lengths)[chosen]
    last = np.flatnonzero(np.diff(completion, append=-1))
    rewards[chosen[last]] = scores[completion[last]]
    return rewards

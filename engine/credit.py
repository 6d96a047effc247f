"""Credit assignment: the scores of whole groups become one advantage a completion."""

import numpy as np
import torch

from engine.algorithms.method import Method
from engine.schema import Group
from engine.scores import Shape


def advantages(method: Method, shape: Shape, groups: list[Group]) -> list[np.ndarray]:
    """The advantage of every completion, float32 [num_samples] for each group.

    Completions without a valid verdict take no part in their group's baseline; theirs is 0, and the packer leaves
    them out.
    """
    valid = [np.array([not verdict.error for verdict in group.verdicts], bool) for group in groups]
    scores = np.concatenate([shape(group)[kept] for group, kept in zip(groups, valid, strict=True)])
    sizes = [int(kept.sum()) for kept in valid]
    number = np.repeat(np.arange(len(groups)), sizes)
    values = method.advantages(torch.from_numpy(scores), torch.from_numpy(number)).float().numpy()
    result = [np.zeros(len(kept), np.float32) for kept in valid]
    for advantage, kept, mine in zip(result, valid, np.split(values, np.cumsum(sizes[:-1])), strict=True):
        advantage[kept] = mine
    return result

"""Credit assignment: the scores of whole groups become advantages of completions, segments or tokens."""

import numpy as np
import torch

from engine.algorithms.method import Method
from engine.config import ConfigError
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
    if method.needs_segments:
        return segment_advantages(method, groups)
    valid = [np.array([not verdict.error for verdict in group.verdicts], bool) for group in groups]
    scores = np.concatenate([shape(group)[kept] for group, kept in zip(groups, valid, strict=True)])
    sizes = [int(kept.sum()) for kept in valid]
    number = np.repeat(np.arange(len(groups)), sizes)
    values = method.advantages(torch.from_numpy(scores), torch.from_numpy(number)).float().numpy()
    result = [np.zeros(len(kept), np.float32) for kept in valid]
    for advantage, kept, mine in zip(result, valid, np.split(values, np.cumsum(sizes[:-1])), strict=True):
        advantage[kept] = mine
    return result


def segment_advantages(method: Method, groups: list[Group]) -> list[np.ndarray]:
    """float32 [T] for each group: every token has its segment's advantage, 0 in a completion that was cut off.

    The rewards' own scores of the segments count, without penalties. Raises `ConfigError` for a valid completion whose
    reward judged no segments.
    """
    judged = [
        (number, sample, verdict)
        for number, group in enumerate(groups)
        for sample, verdict in enumerate(group.verdicts)
        if not verdict.error
    ]
    for number, _, verdict in judged:
        if not verdict.segments:
            raise ConfigError(
                f"algorithm.advantage: judges segments, which the reward of domain {groups[number].domain!r} did not"
            )
    sizes = [len(verdict.segments) for _, _, verdict in judged]
    scores = np.array([segment.score for _, _, verdict in judged for segment in verdict.segments], np.float64)
    completion = np.repeat(np.arange(len(judged)), sizes)
    group_of = np.array([number for number, _, _ in judged], np.int64)
    values = method.advantages(*map(torch.from_numpy, (scores, completion, group_of))).float().numpy()
    result = [np.zeros(len(group.token_ids), np.float32) for group in groups]
    for (number, sample, _), mine in zip(judged, np.split(values, np.cumsum(sizes[:-1])), strict=True):
        group = groups[number]
        begin = sum(group.lengths[:sample])
        if group.finish[sample] != "length":
            tokens = np.diff(group.segment_ends[sample], prepend=0)
            result[number][begin : begin + group.lengths[sample]] = np.repeat(mine, tokens)
    return result


def token_rewards(group: Group, scores: np.ndarray) -> np.ndarray:
    """float32 [T]: each completion's score at its last token that the policy chose, 0 at the others."""
    rewards = np.zeros(len(group.token_ids), np.float32)
    chosen = np.flatnonzero(group.loss_mask)
    completion = np.repeat(np.arange(group.num_samples), group.lengths)[chosen]
    last = np.flatnonzero(np.diff(completion, append=-1))
    rewards[chosen[last]] = scores[completion[last]]
    return rewards

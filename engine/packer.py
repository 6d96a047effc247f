"""Groups to balanced micro-batches: flat arrays without padding, under a token budget, equally many on every rank."""

from dataclasses import dataclass

import numpy as np

from engine.schema import Group


@dataclass(frozen=True)
class MicroBatch:
    """One flat forward without padding: T input tokens in S segments, N target tokens of `num_sequences` completions.

    A segment attends to itself causally and, where `prefix` names a shared prompt, to all of that segment too. The
    last token of a completion is a target only: nothing needs its hidden state. Targets of one completion lie
    together, in order. All arrays may be empty: a rank with nothing to do runs an empty micro-batch.
    """

    token_ids: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T]
    cu_seqlens: np.ndarray  # int32 [S + 1], the segments' bounds on the flat axis
    prefix: np.ndarray  # int32 [S], the segment that this one attends to besides itself; -1: none
    rows: np.ndarray  # int64 [N], the flat position whose logits predict each target
    targets: np.ndarray  # int64 [N]
    sequence: np.ndarray  # int64 [N], the completion of each target: 0 .. num_sequences - 1, non-decreasing
    behaviour: np.ndarray  # float32 [N], log-probability under the weights that sampled it
    advantage: np.ndarray  # float32 [N]
    version: np.ndarray  # int32 [N], the weights that sampled it
    mask: np.ndarray  # float32 [N], 1 where the policy chose the token and it is fresh enough to train
    num_sequences: int
    lengths: np.ndarray  # int64 [num_sequences], tokens that the policy chose, stale ones included


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimiser step and the normalisers of its loss over all ranks.

    The normalisers count every token that the policy chose in a valid completion, stale or fresh, so that masking a
    stale token removes its gradient without making the others' larger.
    """

    micro_batches: list[list[MicroBatch]]  # [rank][i], equally many on every rank and at least one
    num_tokens: int
    num_sequences: int
    num_stale_tokens: int  # tokens among num_tokens that are masked for their age


def pack(
    groups: list[Group],
    advantages: list[np.ndarray],
    *,
    version: int,
    max_staleness: int,
    num_ranks: int,
    budget: int,
    share_prefix: bool,
    num_updates: int,
) -> list[Update]:
    """`groups` as `num_updates` updates of micro-batches of at most `budget` input tokens."""
    raise NotImplementedError

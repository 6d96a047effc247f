"""Groups to balanced micro-batches: flat arrays without padding, under a token budget, equally many on every rank."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from engine.ops import plan
from engine.schema import Group

QUADRATIC = 1 / (12 * 1024)  # attention's work beside the matrix products' at hidden size 1024; serves balance only


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
    stale token removes its gradient without making the others' larger. A completion without a trainable token is in no
    micro-batch.
    """

    micro_batches: list[list[MicroBatch]]  # [rank][i], equally many on every rank and at least one
    num_tokens: int
    num_sequences: int
    num_stale_tokens: int  # tokens among num_tokens that are masked for their age


class Completion(NamedTuple):
    """One valid completion of L tokens, cut from its group."""

    token_ids: np.ndarray  # int [L]
    behaviour: np.ndarray  # float32 [L]
    version: np.ndarray  # int32 [L]
    advantage: np.ndarray  # float32 [L]
    chosen: np.ndarray  # bool [L], the policy chose the token
    trained: np.ndarray  # bool [L], and it is fresh


class Unit(NamedTuple):
    """A prompt and the completions that are laid out beside one copy of it. Never split further."""

    prompt: np.ndarray
    completions: list[Completion]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(len(each.token_ids) - 1 for each in self.completions)

    @property
    def work(self) -> float:
        """Time of the unit's forward in tokens: n of its matrix products, and the area of its attention."""
        num_prompt = len(self.prompt)
        return _work(num_prompt, 0) + sum(_work(len(each.token_ids) - 1, num_prompt) for each in self.completions)


@dataclass
class Layout:
    """The input side of a micro-batch while it is laid out."""

    token_ids: list[np.ndarray] = field(default_factory=list)
    position_ids: list[np.ndarray] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    prefix: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, unit: Unit) -> None:
        """One completion follows its prompt in one segment; several share the prompt's segment as their prefix."""
        num_prompt = len(unit.prompt)
        if len(unit.completions) == 1:
            inputs = unit.completions[0].token_ids[:-1]
            start = self._segment(np.concatenate([unit.prompt, inputs]), 0, -1)
            self.rows.append(np.arange(start + num_prompt - 1, self.bounds[-1]))
            return
        start, shared = self._segment(unit.prompt, 0, -1), len(self.prefix) - 1
        for completion in unit.completions:
            first = self._segment(completion.token_ids[:-1], num_prompt, shared)
            self.rows += [np.array([start + num_prompt - 1]), np.arange(first, self.bounds[-1])]

    def _segment(self, token_ids: np.ndarray, first_position: int, prefix: int) -> int:
        """Appends a segment and returns where it starts. The empty one of a single-token completion is left out."""
        start = self.bounds[-1]
        if len(token_ids):
            self.token_ids.append(token_ids)
            self.position_ids.append(np.arange(first_position, first_position + len(token_ids)))
            self.bounds.append(start + len(token_ids))
            self.prefix.append(prefix)
        return start


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
    """`groups`, in order, as `num_updates` updates for a learner at `version`.

    `advantages[i]` is float32 [num_samples] or [T] of `groups[i]`. A token older than `max_staleness` versions gets
    mask 0; completions whose verdict failed are left out. Every micro-batch holds at most `budget` input tokens. With
    `share_prefix` a group's prompt is laid out once, or once for each part of a group that exceeds the budget.

    Raises `ValueError` for a sequence longer than the budget and for advantages of another length.
    """
    completions = [
        _completions(group, advantage, fresh(group, version, max_staleness))
        for group, advantage in zip(groups, advantages, strict=True)
    ]
    updates = []
    for part in np.array_split(np.arange(len(groups)), num_updates):
        split = _share if share_prefix else _separate
        units = [unit for i in part for unit in split(groups[i].prompt_ids, completions[i], budget)]
        updates.append(_update([each for i in part for each in completions[i]], units, num_ranks, budget))
    return updates


def fresh(group: Group, version: int, max_staleness: int) -> np.ndarray:
    """bool [T]: the tokens of `group` that a learner at `version` may still train. A group without any has expired."""
    return version - group.versions <= max_staleness


def _completions(group: Group, advantage: np.ndarray, is_fresh: np.ndarray) -> list[Completion]:
    """The valid completions of `group` that hold a token which the policy chose."""
    num_tokens = len(group.token_ids)
    if len(advantage) not in (group.num_samples, num_tokens):
        raise ValueError(
            f"group {group.group_id}: {len(advantage)} advantages for {group.num_samples} completions "
            f"of {num_tokens} tokens"
        )
    per_token = advantage if len(advantage) == num_tokens else np.repeat(advantage, group.lengths)
    chosen = group.loss_mask.astype(bool)
    columns = (group.token_ids, group.logprobs, group.versions, per_token, chosen, chosen & is_fresh)
    cuts = np.cumsum(group.lengths)[:-1]
    completions = map(Completion, *(np.split(column, cuts) for column in columns))
    judged = zip(completions, group.verdicts, strict=True)
    return [each for each, verdict in judged if not verdict.error and each.chosen.any()]


def _separate(prompt: np.ndarray, completions: list[Completion], budget: int) -> list[Unit]:
    """One unit for each completion that has a token to train."""
    return [Unit(prompt, [each]) for each in completions if each.trained.any()]


def _share(prompt: np.ndarray, completions: list[Completion], budget: int) -> list[Unit]:
    """As few units as the budget allows, the completions' work balanced among them."""
    trained = [each for each in completions if each.trained.any()]
    whole = Unit(prompt, trained)
    if len(trained) <= 1 or whole.num_tokens <= budget:
        return [whole] if trained else []
    costs = [len(each.token_ids) - 1 for each in trained]
    _check_budget(len(prompt) + max(costs), budget)
    _, _, part = plan(costs, [_work(cost, len(prompt)) for cost in costs], budget - len(prompt), 1)
    return [Unit(prompt, [trained[i] for i in np.flatnonzero(part == mine)]) for mine in np.unique(part)]


def _work(num_tokens: int, context: int) -> float:
    """Time of a causal segment behind `context` tokens: n (matrix products) + q (n^2 + 2 n c) (attention's area)."""
    return num_tokens + QUADRATIC * num_tokens * (num_tokens + 2 * context)


def _check_budget(num_tokens: int, budget: int) -> None:
    if num_tokens > budget:
        raise ValueError(f"learner.tokens_per_micro_batch = {budget}: a sequence has {num_tokens} tokens")


def _update(completions: list[Completion], units: list[Unit], num_ranks: int, budget: int) -> Update:
    _check_budget(max((unit.num_tokens for unit in units), default=0), budget)
    num_micro, rank, micro = plan([unit.num_tokens for unit in units], [unit.work for unit in units], budget, num_ranks)
    bins: list[list[list[Unit]]] = [[[] for _ in range(num_micro)] for _ in range(num_ranks)]
    for unit, r, i in zip(units, rank, micro, strict=True):
        bins[r][i].append(unit)
    return Update(
        micro_batches=[[_micro_batch(each) for each in mine] for mine in bins],
        num_tokens=sum(int(each.chosen.sum()) for each in completions),
        num_sequences=len(completions),
        num_stale_tokens=sum(int((each.chosen & ~each.trained).sum()) for each in completions),
    )


def _micro_batch(units: list[Unit]) -> MicroBatch:
    layout = Layout()
    for unit in units:
        layout.add(unit)
    completions = [completion for unit in units for completion in unit.completions]
    lengths = [len(each.token_ids) for each in completions]
    return MicroBatch(
        token_ids=_flat(layout.token_ids, np.int64),
        position_ids=_flat(layout.position_ids, np.int64),
        cu_seqlens=np.array(layout.bounds, np.int32),
        prefix=np.array(layout.prefix, np.int32),
        rows=_flat(layout.rows, np.int64),
        targets=_flat([each.token_ids for each in completions], np.int64),
        sequence=np.repeat(np.arange(len(completions), dtype=np.int64), lengths),
        behaviour=_flat([each.behaviour for each in completions], np.float32),
        advantage=_flat([each.advantage for each in completions], np.float32),
        version=_flat([each.version for each in completions], np.int32),
        mask=_flat([each.trained for each in completions], np.float32),
        num_sequences=len(completions),
        lengths=np.array([each.chosen.sum() for each in completions], np.int64),
    )


def _flat(parts: list[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype, casting="same_kind")

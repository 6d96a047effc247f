"""Groups to balanced micro-batches: flat arrays without padding, under a token budget, equally many on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from engine.ops import gather, plan
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
    temperature: np.ndarray  # float32 [N], at which it was sampled
    version: np.ndarray  # int32 [N], the weights that sampled it
    mask: np.ndarray  # float32 [N], 1 where the policy chose the token and it is fresh enough to train
    num_sequences: int
    lengths: np.ndarray  # int64 [num_sequences], tokens that the policy chose, stale ones included
    solved: np.ndarray  # bool [num_sequences], the completion did its task


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimiser step and the normalisers of its loss over all ranks.

    The normalisers count every token that the policy chose in a valid completion, stale or fresh, so that masking a
    stale token removes its gradient without making the others' larger. A completion without a trainable token is in no
    micro-batch.
    """

    group_ids: list[int]
    micro_batches: list[list[MicroBatch]]  # [rank][i], equally many on every rank and at least one
    num_tokens: int
    num_sequences: int
    num_solved_tokens: int  # tokens among num_tokens of completions that did their task
    num_stale_tokens: int  # tokens among num_tokens that are masked for their age


@dataclass(frozen=True)
class Batch:
    """Groups laid end to end, in pieces: G prompts and C completions, of which the T columns hold the tokens."""

    group_ids: list[int]  # [G]
    inputs: np.ndarray  # int64, the tokens of all prompts, then the T of all completions
    prompt: np.ndarray  # int64 [C], the piece that a completion continues
    start: np.ndarray  # int64 [G + C], where each piece begins in `inputs`
    size: np.ndarray  # int64 [G + C], its tokens that are inputs: a completion's last is a target only
    position: np.ndarray  # int64 [G + C], of its first token in its sequence
    valid: np.ndarray  # bool [C], it is not left out and holds a token which the policy chose
    solved: np.ndarray  # bool [C], it did its task
    num_chosen: np.ndarray  # int64 [C], tokens that the policy chose
    num_trained: np.ndarray  # int64 [C], those among them that are fresh
    behaviour: np.ndarray  # float32 [T]
    advantage: np.ndarray  # float32 [T]
    temperature: np.ndarray  # float32 [T]
    version: np.ndarray  # int32 [T]
    mask: np.ndarray  # float32 [T], 1 where the policy chose the token and it is fresh

    @property
    def num_prompts(self) -> int:
        return len(self.size) - len(self.prompt)

    def work(self, pieces: np.ndarray) -> np.ndarray:
        """Time of each piece's forward in tokens: n of the matrix products, and the area of its attention.

        n + q (n^2 + 2 n c) for n tokens behind a context of c, the prompt's.
        """
        size, context = self.size[pieces], self.position[pieces]
        return size + QUADRATIC * size * (size + 2 * context)


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
    left_out: list[np.ndarray] | None = None,
) -> list[Update]:
    """`groups`, in order, as `num_updates` updates for a learner at `version`.

    `advantages[i]` is float32 [num_samples] or [T] of `groups[i]`. A token older than `max_staleness` versions gets
    mask 0; completions whose verdict failed or that `left_out`, bool [num_samples] a group, names are left out. Every
    micro-batch holds at most `budget` input tokens. With `share_prefix` a group's prompt is laid out once, or once for
    each part of a group that exceeds the budget.

    Raises `ValueError` for a sequence longer than the budget and for advantages of another length.
    """
    updates = []
    dropped = [np.zeros(group.num_samples, bool) for group in groups] if left_out is None else left_out
    bounds = [-(-len(groups) * number // num_updates) for number in range(num_updates + 1)]
    for part in map(slice, bounds, bounds[1:]):
        batch = _batch(groups[part], advantages[part], dropped[part], version, max_staleness)
        trained = np.flatnonzero(batch.valid & (batch.num_trained > 0))
        units = (_share if share_prefix else _separate)(batch, trained, budget)
        updates.append(_update(batch, units, num_ranks, budget))
    return updates


def fresh(group: Group, version: int, max_staleness: int) -> np.ndarray:
    """bool [T]: the tokens of `group` that a learner at `version` may still train. A group without any has expired."""
    return version - group.versions <= max_staleness


def _batch(
    groups: list[Group], advantages: list[np.ndarray], dropped: list[np.ndarray], version: int, max_staleness: int
) -> Batch:
    per_token = [_per_token(group, advantage) for group, advantage in zip(groups, advantages, strict=True)]
    prompt = np.repeat(np.arange(len(groups)), [group.num_samples for group in groups])
    prompt_lengths = np.array([len(group.prompt_ids) for group in groups], np.int64)
    lengths = _flat([group.lengths for group in groups], np.int64)
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    failed = np.array([bool(verdict.error) for verdict in verdicts], bool) | _flat(dropped, bool)
    chosen = _flat([group.loss_mask for group in groups], np.uint8).astype(bool)
    trained = chosen & _flat([fresh(group, version, max_staleness) for group in groups], bool)
    num_chosen = _sums(chosen, lengths)
    return Batch(
        group_ids=[group.group_id for group in groups],
        inputs=_flat([group.prompt_ids for group in groups] + [group.token_ids for group in groups], np.int64),
        prompt=prompt,
        start=_bounds(np.append(prompt_lengths, lengths))[:-1],
        size=np.append(prompt_lengths, lengths - 1),
        position=np.append(np.zeros_like(prompt_lengths), prompt_lengths[prompt]),
        valid=~failed & (num_chosen > 0),
        solved=np.array([verdict.solved for verdict in verdicts], bool),
        num_chosen=num_chosen,
        num_trained=_sums(trained, lengths),
        behaviour=_flat([group.logprobs for group in groups], np.float32),
        advantage=_flat(per_token, np.float32),
        temperature=_flat([np.full(len(each.token_ids), each.temperature, np.float32) for each in groups], np.float32),
        version=_flat([group.versions for group in groups], np.int32),
        mask=trained.astype(np.float32),
    )


def _per_token(group: Group, advantage: np.ndarray) -> np.ndarray:
    num_tokens = len(group.token_ids)
    if len(advantage) not in (group.num_samples, num_tokens):
        raise ValueError(
            f"group {group.group_id}: {len(advantage)} advantages for {group.num_samples} completions "
            f"of {num_tokens} tokens"
        )
    return advantage if len(advantage) == num_tokens else np.repeat(advantage, group.lengths)


# A unit is a prompt and completions that are laid out beside one copy of it: their pieces. It is never split further.


def _separate(batch: Batch, completions: np.ndarray, budget: int) -> list[np.ndarray]:
    """A unit for each completion."""
    return list(np.column_stack([batch.prompt[completions], batch.num_prompts + completions]))


def _share(batch: Batch, completions: np.ndarray, budget: int) -> list[np.ndarray]:
    """As few units of each prompt as the budget allows, the completions' work balanced among them."""
    prompts, first = np.unique(batch.prompt[completions], return_index=True)
    siblings = np.split(batch.num_prompts + completions, first[1:])  # without prompts one part, which is empty
    return [unit for pair in zip(prompts, siblings, strict=False) for unit in _split(batch, *pair, budget)]


def _split(batch: Batch, prompt: int, siblings: np.ndarray, budget: int) -> list[np.ndarray]:
    room, costs = budget - int(batch.size[prompt]), batch.size[siblings]
    if len(siblings) == 1 or costs.sum() <= room:
        return [np.append(prompt, siblings)]
    _check_budget(budget - room + costs.max(), budget)
    _, _, part = plan(costs, batch.work(siblings), room, 1)
    return [np.append(prompt, siblings[part == mine]) for mine in np.unique(part)]


def _check_budget(num_tokens: int, budget: int) -> None:
    if num_tokens > budget:
        raise ValueError(f"learner.tokens_per_micro_batch = {budget}: a sequence has {num_tokens} tokens")


def _update(batch: Batch, units: list[np.ndarray], num_ranks: int, budget: int) -> Update:
    pieces, first = _flat(units, np.int64), _bounds([len(unit) for unit in units])[:-1]
    costs = np.add.reduceat(batch.size[pieces], first)
    _check_budget(costs.max(initial=0), budget)
    num_micro, rank, micro = plan(costs, np.add.reduceat(batch.work(pieces), first), budget, num_ranks)
    bins: list[list[list[np.ndarray]]] = [[[] for _ in range(num_micro)] for _ in range(num_ranks)]
    for unit, r, i in zip(units, rank, micro, strict=True):
        bins[r][i].append(unit)
    return Update(
        group_ids=batch.group_ids,
        micro_batches=[[_micro_batch(batch, _flat(each, np.int64)) for each in mine] for mine in bins],
        num_tokens=int(batch.num_chosen[batch.valid].sum()),
        num_sequences=int(batch.valid.sum()),
        num_solved_tokens=int(batch.num_chosen[batch.valid & batch.solved].sum()),
        num_stale_tokens=int((batch.num_chosen - batch.num_trained)[batch.valid].sum()),
    )


def _micro_batch(batch: Batch, pieces: np.ndarray) -> MicroBatch:
    """A lone completion follows its prompt in one segment; several have their own, and the prompt's as their prefix."""
    is_prompt = pieces < batch.num_prompts
    unit, sizes = np.cumsum(is_prompt) - 1, batch.size[pieces]
    bounds, begins = _bounds(sizes), _bounds(sizes)[:-1]
    opens = (sizes > 0) & (is_prompt | (np.bincount(unit)[unit] > 2))
    segment = np.cumsum(opens) - 1
    (token_ids,) = gather([batch.inputs], batch.start[pieces], bounds)

    completions = pieces[~is_prompt] - batch.num_prompts
    num_prompt_tokens = len(batch.inputs) - len(batch.mask)
    lengths = sizes[~is_prompt] + 1
    targets = _bounds(lengths)
    rows = np.arange(targets[-1]) + np.repeat(begins[~is_prompt] - 1 - targets[:-1], lengths)
    rows[targets[:-1]] = bounds[1:][is_prompt][unit[~is_prompt]] - 1  # the prompt's end predicts the first token
    facts = batch.behaviour, batch.advantage, batch.temperature, batch.version, batch.mask
    columns = (batch.inputs[num_prompt_tokens:], *facts)
    chosen = gather(columns, batch.start[pieces[~is_prompt]] - num_prompt_tokens, targets)
    return MicroBatch(
        token_ids=token_ids,
        position_ids=np.arange(bounds[-1]) + np.repeat(batch.position[pieces] - begins, sizes),
        cu_seqlens=np.append(begins[opens], bounds[-1]).astype(np.int32),
        prefix=np.where(is_prompt, -1, segment[is_prompt][unit])[opens].astype(np.int32),
        rows=rows,
        sequence=np.repeat(np.arange(len(completions)), lengths),
        **dict(zip(("targets", "behaviour", "advantage", "temperature", "version", "mask"), chosen, strict=True)),
        num_sequences=len(completions),
        lengths=batch.num_chosen[completions],
        solved=batch.solved[completions],
    )


def _flat(parts: Sequence[Sequence | np.ndarray], dtype: DTypeLike) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype, casting="same_kind")


def _bounds(lengths: np.ndarray | list[int]) -> np.ndarray:
    """int64 [n + 1]: where parts of these lengths begin and end that lie end to end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _sums(counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [n]: the sum over each of n parts."""
    return np.diff(_bounds(counts)[_bounds(lengths)])

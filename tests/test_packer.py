import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from engine.packer import MicroBatch, Update, fresh, pack
from engine.schema import Group
from rewards.verdict import Verdict


def make_group(prompt, completions, *, versions=None, loss_mask=None, failed=(), group_id=0) -> Group:
    tokens = np.array([token for completion in completions for token in completion], np.int32)
    return Group(
        kind="train", group_id=group_id, attempt=1, incarnation=0, generator="g", domain="d", lease_version=0,
        temperature=1.0, prompt_ids=np.array(prompt, np.int32), lengths=[len(each) for each in completions],
        finish=["stop"] * len(completions),
        verdicts=[Verdict.failed("died") if i in failed else Verdict(1.0, True) for i in range(len(completions))],
        token_ids=tokens, logprobs=-tokens.astype(np.float32) / 100,
        versions=np.zeros(len(tokens), np.int32) if versions is None else np.array(versions, np.int32),
        loss_mask=np.ones(len(tokens), np.uint8) if loss_mask is None else np.array(loss_mask, np.uint8),
    )  # fmt: skip


def pack_one(groups, advantages, **options) -> Update:
    defaults = dict(version=0, max_staleness=4, num_ranks=1, budget=1000, share_prefix=True, num_updates=1)
    (update,) = pack(groups, [np.array(each, np.float32) for each in advantages], **{**defaults, **options})
    return update


def only(update: Update) -> MicroBatch:
    ((micro_batch,),) = update.micro_batches
    return micro_batch


def test_shared_layout_worked_by_hand():
    batch = only(pack_one([make_group([10, 11, 12], [[20, 21, 22], [30], [40, 41]])], [[1, 2, 3]]))
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 21, 40]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.prefix.tolist() == [-1, 0, 0]
    assert batch.targets.tolist() == [20, 21, 22, 30, 40, 41]
    assert batch.rows.tolist() == [2, 3, 4, 2, 2, 5]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.advantage.tolist() == [1, 1, 1, 2, 3, 3]
    assert batch.behaviour == pytest.approx([-0.2, -0.21, -0.22, -0.3, -0.4, -0.41])
    assert (batch.num_sequences, batch.lengths.tolist()) == (3, [3, 1, 2])


def test_separate_layout_worked_by_hand():
    update = pack_one([make_group([10, 11], [[20, 21, 22], [30]])], [[1, 2]], share_prefix=False)
    batch = only(update)
    assert batch.token_ids.tolist() == [10, 11, 20, 21, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.prefix.tolist() == [-1, -1]
    assert batch.rows.tolist() == [1, 2, 3, 5]
    assert (update.num_tokens, update.num_sequences) == (4, 2)


def test_prefix_of_a_second_group_points_into_its_own_prompt():
    batch = only(pack_one([make_group([1], [[2, 3], [4, 5]]), make_group([6], [[7, 8], [9, 10]])], [[1, 1], [1, 1]]))
    assert batch.prefix.tolist() == [-1, 0, 0, -1, 3, 3]
    assert batch.token_ids.tolist() == [1, 2, 4, 6, 7, 9]
    assert batch.rows.tolist() == [0, 1, 0, 2, 3, 4, 3, 5]


def test_a_lone_completion_needs_no_prefix():
    batch = only(pack_one([make_group([1, 2], [[3, 4]])], [[1]]))
    assert (batch.prefix.tolist(), batch.token_ids.tolist(), batch.rows.tolist()) == ([-1], [1, 2, 3], [1, 2])


def test_stale_tokens_are_masked_but_still_counted():
    group = make_group([1], [[2, 3, 4], [5, 6]], versions=[0, 5, 6, 0, 0])
    update = pack_one([group], [[1, 1]], version=9, max_staleness=4)
    batch = only(update)
    assert batch.targets.tolist() == [2, 3, 4]  # nothing of the second completion is fresh
    assert batch.mask.tolist() == [0, 1, 1]
    assert batch.version.tolist() == [0, 5, 6]
    assert batch.lengths.tolist() == [3]
    assert (update.num_tokens, update.num_sequences, update.num_stale_tokens) == (5, 2, 3)
    assert fresh(group, 9, 4).tolist() == [False, True, True, False, False]


def test_observations_are_context_and_no_targets_of_the_loss():
    update = pack_one([make_group([1], [[2, 3, 4]], loss_mask=[1, 0, 1])], [[1]])
    batch = only(update)
    assert (batch.token_ids.tolist(), batch.mask.tolist(), batch.lengths.tolist()) == ([1, 2, 3], [1, 0, 1], [2])
    assert (update.num_tokens, update.num_stale_tokens) == (2, 0)


def test_failed_completions_are_left_out():
    update = pack_one([make_group([1], [[2, 3], [4], [5, 6]], failed=[0])], [[7, 8, 9]])
    batch = only(update)
    assert (batch.targets.tolist(), batch.advantage.tolist()) == ([4, 5, 6], [8, 9, 9])
    assert (update.num_tokens, update.num_sequences) == (3, 2)


def test_advantages_per_token():
    batch = only(pack_one([make_group([1], [[2, 3], [4]])], [[0.5, -1, 2]]))
    assert batch.advantage.tolist() == [0.5, -1, 2]
    with pytest.raises(ValueError, match="group 0: 4 advantages for 2 completions of 3 tokens"):
        pack_one([make_group([1], [[2, 3], [4]])], [[0, 0, 0, 0]])


def test_a_group_above_the_budget_is_split_and_its_prompt_copied():
    group = make_group([1, 1, 1, 1], [[2] * 4, [3] * 4, [4] * 4, [5] * 4])  # 4 + 4 * 3 = 16 tokens in one piece
    update = pack_one([group], [[1, 2, 3, 4]], budget=10)
    assert [len(each.token_ids) for each in update.micro_batches[0]] == [10, 10]
    assert sorted(each.prefix.tolist() for each in update.micro_batches[0]) == [[-1, 0, 0]] * 2
    assert (update.num_tokens, update.num_sequences) == (16, 4)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_sequence_longer_than_the_budget_is_an_error(share_prefix):
    with pytest.raises(ValueError, match="learner.tokens_per_micro_batch = 6: a sequence has 7 tokens"):
        pack_one([make_group([1] * 4, [[2] * 4, [3] * 2])], [[1, 1]], budget=6, share_prefix=share_prefix)


def test_updates_hold_the_groups_in_order():
    groups = [make_group([9], [[i, i]]) for i in range(5)]
    updates = pack(groups, [np.ones(1, np.float32)] * 5, version=0, max_staleness=0, num_ranks=1, budget=100,
                   share_prefix=True, num_updates=2)  # fmt: skip
    assert [only(update).targets.tolist() for update in updates] == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4]]
    assert [update.num_sequences for update in updates] == [3, 2]


def test_ranks_without_work_get_an_empty_micro_batch():
    update = pack_one([make_group([1], [[2, 3]])], [[1]], num_ranks=3)
    assert [[len(each.token_ids) for each in mine] for mine in update.micro_batches] == [[2], [0], [0]]
    empty = update.micro_batches[2][0]
    assert (empty.cu_seqlens.tolist(), empty.num_sequences, len(empty.rows), len(empty.lengths)) == ([0], 0, 0, 0)
    expected = dict(token_ids="<i8", position_ids="<i8", cu_seqlens="<i4", prefix="<i4", rows="<i8", targets="<i8",
                    sequence="<i8", behaviour="<f4", advantage="<f4", version="<i4", mask="<f4",
                    lengths="<i8")  # fmt: skip
    for batch in (empty, update.micro_batches[0][0]):
        assert {name: getattr(batch, name).dtype.str for name in expected} == expected


def test_nothing_to_train_is_one_empty_micro_batch():
    update = pack_one([make_group([1], [[2, 3]])], [[1]], version=5, max_staleness=4)
    assert len(only(update).token_ids) == 0
    assert (update.num_tokens, update.num_stale_tokens) == (2, 2)


def contexts(batch: MicroBatch) -> list[tuple]:
    """What each target sees: (tokens of the prefix and of its segment up to its row, its positions, target, ...)."""
    seen = []
    for row, *facts in zip(batch.rows, batch.targets, batch.behaviour, batch.advantage, batch.mask, strict=True):
        segment = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
        flat = np.arange(int(batch.cu_seqlens[segment]), int(row) + 1)
        if (shared := batch.prefix[segment]) >= 0:
            assert batch.prefix[shared] == -1
            flat = np.concatenate([np.arange(*batch.cu_seqlens[shared : shared + 2].tolist()), flat])
        assert batch.position_ids[flat].tolist() == list(range(len(flat)))
        seen.append((tuple(batch.token_ids[flat]), *facts))
    return seen


@st.composite
def random_groups(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups = []
    for number in range(draw(st.integers(0, 5))):
        completions = [random.integers(10, 99, random.integers(1, 9)) for _ in range(random.integers(1, 6))]
        size = sum(map(len, completions))
        groups.append(
            make_group(
                random.integers(10, 99, random.integers(1, 7)), completions, group_id=number,
                versions=random.integers(0, 10, size), loss_mask=random.integers(0, 2, size),
                failed=[i for i in range(len(completions)) if random.random() < 0.2],
            )  # fmt: skip
        )
    return groups


@settings(max_examples=60, deadline=None)
@given(random_groups(), st.integers(1, 3), st.integers(14, 60), st.booleans())
def test_every_target_sees_its_own_prompt_and_completion(groups, num_ranks, budget, share_prefix):
    advantages = [np.arange(group.num_samples) + 10 * group.group_id for group in groups]
    update = pack_one(groups, advantages, version=9, num_ranks=num_ranks, budget=budget, share_prefix=share_prefix)
    expected, num_tokens, num_stale, num_sequences = [], 0, 0, 0
    for group, advantage in zip(groups, advantages, strict=True):
        start = 0
        for i, length in enumerate(group.lengths):
            span = slice(start, start + length)
            start += length
            chosen, young = group.loss_mask[span] == 1, group.versions[span] >= 5
            if group.verdicts[i].error or not chosen.any():
                continue
            num_tokens, num_stale = num_tokens + chosen.sum(), num_stale + (chosen & ~young).sum()
            num_sequences += 1
            if not (chosen & young).any():
                continue
            tokens = group.token_ids[span]
            expected += [
                ((*group.prompt_ids, *tokens[:j]), tokens[j], group.logprobs[span][j], np.float32(advantage[i]),
                 np.float32(chosen[j] and young[j]))
                for j in range(length)
            ]  # fmt: skip
    batches = [batch for mine in update.micro_batches for batch in mine]
    assert len({len(mine) for mine in update.micro_batches}) == 1
    assert all(len(batch.token_ids) <= budget for batch in batches)
    assert all((np.diff(batch.cu_seqlens) > 0).all() for batch in batches)
    assert sorted(fact for batch in batches for fact in contexts(batch)) == sorted(expected)
    assert (update.num_tokens, update.num_stale_tokens, update.num_sequences) == (num_tokens, num_stale, num_sequences)

"""The operators on hidden states: held to the slots in plain torch by every option, in chunks of any size."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import CASES, NUM_BINS, PPO, TOLERANCE, Case, check, close, poisoned, same
from torch import Tensor

from engine.config import Algorithm
from engine.ops import loss
from engine.ops.loss import HEALTH, TokenLoss, linear_stats, linear_token_loss

__all__ = ["poisoned"]
pytestmark = pytest.mark.filterwarnings("ignore:algorithm.kl.name = 'k1'")

Gradients = tuple[TokenLoss, Tensor, Tensor]


@contextmanager
def chunks_of(rows: int, vocab: int):
    """So little memory that `rows` rows of float32 logits fill it."""
    with mock.patch.dict(loss.CHUNK_BYTES, cpu=rows * vocab * 4), mock.patch.object(loss, "CHUNK_SHARE", 0.0):
        yield


def passed(case: Case, *, factor: float = 1.0, **options) -> Gradients:
    """The loss, and the gradients of `factor` times it by hidden states and weight."""
    hidden, weight, targets = case.head
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    options = {"temperature": case.temperature, "num_bins": NUM_BINS} | options
    out = linear_token_loss(hidden, weight, targets, case.tokens, case.recipe, **options)
    (factor * out.loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return out, hidden.grad, weight.grad


def expected(case: Case, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients by hidden states and weight of `objective` of the logits, in float64."""
    hidden, weight, _ = case.head
    hidden, weight = hidden.double().clone().requires_grad_(), weight.double().clone().requires_grad_()
    objective(hidden @ weight.T).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def exact_logits(case: Case) -> Tensor:
    hidden, weight, _ = case.head
    return (hidden.double() @ weight.double().T).requires_grad_()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=CASES, rows=st.integers(1, 9))
def test_the_loss_is_that_of_the_slots_in_chunks_of_any_size(case: Case, rows: int):
    tolerance = TOLERANCE[torch.promote_types(case.dtype, torch.float32)]
    hidden_grad, weight_grad = expected(case, lambda logits: 3 * case.reference(logits).loss)
    with chunks_of(rows, case.vocab):
        out, d_hidden, d_weight = passed(case, factor=3)
        check(case, out, case.reference(exact_logits(case)), tolerance)
        assert close(d_hidden, hidden_grad, TOLERANCE[case.dtype])
        assert close(d_weight, weight_grad, TOLERANCE[case.dtype])
        less, *gradients = passed(case, factor=3, health_of_all=False)
    assert close(less.loss, out.loss, tolerance)
    assert close(less.coefficient, out.coefficient, tolerance)
    assert close(gradients[0], hidden_grad, TOLERANCE[case.dtype])
    assert close(gradients[1], weight_grad, TOLERANCE[case.dtype])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=CASES, rows=st.integers(1, 9))
def test_log_probability_and_entropy_are_differentiable(case: Case, rows: int):
    a, b = case.tokens.advantage, case.tokens.behaviour * case.tokens.mask
    hidden, weight, targets = case.head
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with chunks_of(rows, case.vocab):
        logprob, entropy = linear_stats(ours[0], ours[1], targets, temperature=case.temperature)
        ((a * logprob).sum() + (b * entropy).sum()).backward()

    def objective(logits: Tensor) -> Tensor:
        exact = case.reference(logits)
        return (a * exact.logprob).sum() + (b * exact.entropy).sum()

    tolerance = TOLERANCE[torch.promote_types(case.dtype, torch.float32)]
    exact = case.reference(exact_logits(case))
    assert close(logprob, exact.logprob, tolerance, floor=1)
    assert close(entropy, exact.entropy, tolerance, floor=1)
    for tensor, gradient in zip(ours, expected(case, objective), strict=True):
        assert tensor.grad is not None and close(tensor.grad, gradient, TOLERANCE[case.dtype])


# ---- Rows cost what they need


def ppo(**fields) -> Case:
    """PPO with a clip that holds about half of the tokens back."""
    return replace(Case(PPO, torch.float32, [9, 1, 20, 10], vocab=50), **fields)


def product_rows(case: Case, **options) -> tuple[int, int, int]:
    """How many rows passed the products for logits, hidden states' gradient and weight's gradient."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees one thread
    with torch.profiler.profile(record_shapes=True) as profile:
        passed(case, **options)
    torch.set_num_threads(num_threads)
    rows = [0, 0, 0]
    halves = 2  # of the vocabulary: each product comes in two panels
    for event in profile.events() or []:
        if event.name == "aten::mm":
            rows[0] += event.input_shapes[0][0]
        elif event.name == "aten::addmm":
            is_weight = event.input_shapes[2][0] != case.vocab // halves
            rows[2 if is_weight else 1] += event.input_shapes[1][1 if is_weight else 0]
    return rows[0] // halves, rows[1] // halves, rows[2] // halves


def test_masked_rows_take_part_in_no_product_and_clipped_ones_in_the_first_alone():
    case = ppo()
    num_unmasked = int(case.tokens.mask.sum())
    num_sloped = int((passed(case)[0].coefficient != 0).sum())
    assert 0 < num_sloped < num_unmasked < case.num_tokens
    assert product_rows(case) == (num_unmasked, num_sloped, num_sloped)


def test_rows_without_advantage_or_weight_take_part_in_none_where_their_health_is_not_asked_for():
    case = ppo()
    case.tokens.omega[:5] = 0
    idle = (case.tokens.advantage == 0) | (case.tokens.omega == 0)
    num_needed = int((case.tokens.mask * ~idle).sum())
    num_sloped = int((passed(case)[0].coefficient != 0).sum())
    assert product_rows(case, health_of_all=False) == (num_needed, num_sloped, num_sloped)
    out, *_ = passed(case, health_of_all=False)
    assert out.health[HEALTH.index("tokens")] == num_needed
    assert not out.logprob[idle].any() and not out.ratio[idle].any()


def test_sequences_are_left_out_whole_where_the_recipe_looks_at_them():
    case = ppo(algorithm=with_loss({"name": "gspo", "low": 0.9, "high": 9.0}))
    case.tokens.advantage[:10] = 0
    case.tokens.mask[10:12] = 0
    needed = case.tokens.mask.clone()
    needed[:10] = 0
    num_needed, num_sloped = int(needed.sum()), int((passed(case)[0].coefficient != 0).sum())
    assert product_rows(case, health_of_all=False) == (num_needed, num_sloped, num_sloped)
    assert same(passed(case, health_of_all=False)[0].coefficient, passed(case)[0].coefficient)


def with_loss(slot: dict) -> Algorithm:
    return msgspec.structs.replace(PPO, loss=slot)


def test_what_masked_rows_hold_is_never_read():
    case = ppo()
    masked = case.tokens.mask == 0
    whole = passed(case)
    hidden, *_ = case.head
    hidden[masked] = float("nan")
    for name in ("behaviour", "proximal", "advantage"):
        getattr(case.tokens, name)[masked] = float("nan")
    (ours, *gradients), (theirs, *their_gradients) = passed(case), whole
    assert all(torch.equal(a, b) for a, b in zip([*ours, *gradients], [*theirs, *their_gradients], strict=True))


def test_only_the_gradients_that_are_wanted_are_made():
    case = ppo()
    hidden, weight, targets = case.head
    _, d_hidden, d_weight = passed(case)
    out = linear_token_loss(hidden.requires_grad_(), weight, targets, case.tokens, case.recipe)
    out.loss.backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, d_hidden)
    out = linear_token_loss(hidden.detach(), weight.requires_grad_(), targets, case.tokens, case.recipe)
    out.loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, d_weight)
    with torch.profiler.profile() as profile, torch.no_grad():
        linear_token_loss(hidden, weight, targets, case.tokens, case.recipe)
    assert "aten::addmm" not in {event.name for event in profile.events() or []}


# ---- Shapes


@pytest.mark.parametrize("loss", [{"name": "ppo_clip"}, {"name": "gspo"}])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 3, 0], [1, 1, 1]])
def test_no_tokens_sequences_without_tokens_and_of_one(loss: dict, lengths: list[int]):
    case = ppo(algorithm=with_loss(loss), lengths=lengths)
    out, d_hidden, d_weight = passed(case)
    if sum(lengths) == 0:
        assert out.loss == 0 and not out.health.any() and d_hidden.numel() == 0 and not d_weight.any()
    else:
        check(case, out, case.reference(exact_logits(case)), 3e-5)


@pytest.mark.parametrize("loss", [{"name": "ppo_clip"}, {"name": "gspo"}])
def test_wholly_masked_tokens_give_no_loss(loss: dict):
    case = ppo(algorithm=with_loss(loss))
    case.tokens.mask.zero_()
    out, d_hidden, d_weight = passed(case)
    assert out.loss == 0 and not out.health.any() and not d_hidden.any() and not d_weight.any()


@pytest.mark.parametrize("vocab", [151_936, 151_937])
def test_a_vocabulary_of_a_large_model(vocab: int):
    case = ppo(vocab=vocab, lengths=[3, 2], width=4)
    hidden_grad, weight_grad = expected(case, lambda logits: case.reference(logits).loss)
    out, d_hidden, d_weight = passed(case)
    check(case, out, case.reference(exact_logits(case)), 3e-5)
    assert close(d_hidden, hidden_grad, 3e-5) and close(d_weight, weight_grad, 3e-5)


def test_tied_and_strided_factors():
    case = ppo(dtype=torch.float64)
    hidden, weight, targets = case.head
    whole = passed(case)
    table = torch.zeros(2 * case.vocab, 3 * case.width, dtype=torch.float64)
    table[::2, ::3] = weight
    table.requires_grad_()
    wide = torch.zeros(case.num_tokens, 2 * case.width, dtype=torch.float64)
    wide[:, ::2] = hidden
    tied = table[::2, ::3]
    loss = linear_token_loss(wide[:, ::2], tied, targets, case.tokens, case.recipe, num_bins=NUM_BINS).loss
    (loss + tied.sum()).backward()
    assert table.grad is not None and close(table.grad[::2, ::3], whole[2] + 1, 1e-12)


# ---- The same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [{"name": "ppo_clip"}, {"name": "gspo"}])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, loss: dict):
    algorithm = with_loss(loss)
    case = ppo(algorithm=algorithm, dtype=dtype, vocab=40_001, width=64, lengths=[30, 7, 90])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            out, d_hidden, d_weight = passed(case)
            hidden, weight, targets = case.head
            results.append([*out, d_hidden, d_weight, *linear_stats(hidden, weight, targets)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

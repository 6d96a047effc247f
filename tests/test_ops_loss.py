"""The operators on logits: held to the slots in plain torch, by every option."""

import math
from dataclasses import replace
from functools import partial
from math import inf as INFINITY

import pytest
import torch
from hypothesis import given, settings
from token_cases import CASES, NO_KL, NUM_BINS, PPO, TOLERANCE, Case, check, close, poisoned
from torch import Tensor

from engine.algorithms.corrections import CORRECTIONS
from engine.algorithms.divergences import DIVERGENCES
from engine.algorithms.losses import LOSSES
from engine.config import Algorithm
from engine.ops.loss import (
    HEALTH,
    Recipe,
    TokenLoss,
    linear_stats,
    linear_token_loss,
    row_stats,
    token_loss,
    token_loss_,
)

__all__ = ["poisoned"]
pytestmark = pytest.mark.filterwarnings("ignore:algorithm.kl.name = 'k1'")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=CASES)
def test_the_loss_is_that_of_the_slots(case: Case):
    logits = case.logits.double().clone().requires_grad_()
    expected = case.reference(logits)
    expected.loss.backward(retain_graph=True)
    ours = case.logits.clone().requires_grad_()
    arguments = (case.head[2], case.tokens, case.recipe)
    out = token_loss(ours, *arguments, temperature=case.temperature, num_bins=NUM_BINS)
    (3 * out.loss).backward()
    check(case, out, expected, TOLERANCE[torch.promote_types(case.dtype, torch.float32)])
    assert logits.grad is not None and ours.grad is not None
    assert close(ours.grad, 3 * logits.grad, TOLERANCE[case.dtype])

    spot = case.logits.clone()
    again = token_loss_(spot, *arguments, temperature=case.temperature, num_bins=NUM_BINS)
    assert close(spot, logits.grad, TOLERANCE[case.dtype])
    with torch.no_grad():
        alone = token_loss(case.logits, *arguments, temperature=case.temperature, num_bins=NUM_BINS)
    for field in ("loss", "logprob", "entropy", "ratio", "coefficient", "health"):
        assert torch.equal(getattr(again, field), getattr(out, field))
        assert close(getattr(alone, field), getattr(out, field), TOLERANCE[torch.float32])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(case=CASES)
def test_log_probability_and_entropy_are_differentiable(case: Case):
    logits = case.logits.double().clone().requires_grad_()
    expected = case.reference(logits)
    ours = case.logits.clone().requires_grad_()
    logprob, entropy, lse = row_stats(ours, case.head[2], temperature=case.temperature)
    tolerance = TOLERANCE[torch.promote_types(case.dtype, torch.float32)]
    assert close(logprob, expected.logprob.detach(), tolerance, floor=1)
    assert close(entropy, expected.entropy.detach(), tolerance, floor=1)
    assert close(lse, torch.logsumexp(case.logits.double() / case.temperature, 1), tolerance)
    a, b = case.tokens.advantage, case.tokens.behaviour
    ((a * logprob).sum() + (b * entropy).sum()).backward()
    ((a * expected.logprob).sum() + (b * expected.entropy).sum()).backward()
    assert logits.grad is not None and ours.grad is not None
    assert close(ours.grad, logits.grad, TOLERANCE[case.dtype])


# ---- Edges


def one(loss: dict, logits: list[float], advantage: float, proximal: float, dtype: torch.dtype) -> TokenLoss:
    """The loss of one token, the first of the vocabulary."""
    case = Case(Algorithm(loss=loss, correction={"name": "decoupled"}, kl=NO_KL), dtype, [1], len(logits))
    known = replace(
        case.tokens,
        advantage=torch.tensor([advantage], dtype=dtype),
        proximal=torch.tensor([proximal], dtype=dtype),
        behaviour=torch.tensor([proximal], dtype=dtype),
        mask=torch.ones(1, dtype=dtype),
        omega=torch.ones(1, dtype=dtype),
    )
    return token_loss(torch.tensor([logits], dtype=dtype), torch.tensor([0]), known, case.recipe)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("loss", "ratio", "advantage", "slope"),
    [
        ({"name": "ppo_clip", "low": 0.0, "high": 0.0}, 1.0, 2.0, -2.0),
        ({"name": "ppo_clip", "low": 0.0, "high": 0.0}, 1.0, -2.0, 2.0),
        ({"name": "ppo_clip", "low": 0.0, "high": 0.0, "dual": 1.0}, 1.0, -2.0, 2.0),
        ({"name": "ppo_clip", "low": 0.5, "high": 1.0}, 2.0, 1.0, -2.0),
        ({"name": "ppo_clip", "low": 0.5, "high": 1.0}, 0.5, -1.0, 0.5),
        ({"name": "ppo_clip", "low": 0.5, "high": 0.5, "dual": 2.0}, 2.0, -1.0, 2.0),
        ({"name": "icepop", "low": 0.5, "high": 2.0}, 2.0, 1.0, -2.0),
        ({"name": "icepop", "low": 0.5, "high": 2.0}, 0.5, 1.0, -0.5),
        ({"name": "gspo", "low": 0.5, "high": 1.0}, 2.0, 1.0, -2.0),
        ({"name": "gspo_token", "low": 0.5, "high": 1.0}, 0.5, -1.0, 0.5),
    ],
)
def test_a_ratio_on_its_bound_still_has_its_gradient(
    loss: dict, ratio: float, advantage: float, slope: float, dtype: torch.dtype
):
    # Two equal logits: log pi = -log 2, so that proximal log-probabilities of 0, -log 2 and -log 4 make exact ratios.
    logprob = row_stats(torch.zeros(1, 2, dtype=dtype), torch.tensor([0]))[0]
    out = one(loss, [0.0, 0.0], advantage, float(logprob * {0.5: 0.0, 1.0: 1.0, 2.0: 2.0}[ratio]), dtype)
    assert out.ratio.item() == ratio
    assert out.coefficient.item() == slope
    assert out.health[HEALTH.index("clipped")] == 0


def test_no_advantage_no_gradient():
    out = one({"name": "ppo_clip"}, [0.0, 0.0], 0.0, -3.0, torch.float64)
    assert out.loss == 0 and out.coefficient == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
def test_logits_far_from_zero_and_of_minus_infinity(shift: float, dtype: torch.dtype):
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]], dtype=torch.float64).add(shift).to(dtype)
    barred = torch.tensor([[0.0, -INFINITY, 0.0, 0.0]], dtype=dtype)
    left = torch.tensor([0, 2, 3])
    ours = (logits + barred).requires_grad_()
    logprob, entropy, lse = row_stats(ours, torch.tensor([2]))
    (logprob + entropy).sum().backward()
    exact = logits[:, left].double().requires_grad_()
    exact_logprob, exact_entropy, exact_lse = row_stats(exact, torch.tensor([1]))
    (exact_logprob + exact_entropy).sum().backward()
    tolerance = TOLERANCE[torch.promote_types(dtype, torch.float32)]
    assert close(logprob, exact_logprob, tolerance) and close(entropy, exact_entropy, tolerance)
    assert close(lse, exact_lse, tolerance)
    assert ours.grad is not None and exact.grad is not None
    assert ours.grad[0, 1] == 0 and close(ours.grad[:, left], exact.grad, 10 * TOLERANCE[dtype])


def test_rows_that_cannot_be_are_nan_and_leave_the_others_alone():
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    logprob, entropy, _ = row_stats(logits, torch.tensor([0, 0, 0]))
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("vocab", [151_936, 151_937])
def test_a_vocabulary_of_a_large_model(vocab: int):
    case = Case(PPO, torch.bfloat16, [2, 1], vocab)
    logits = case.logits.double().requires_grad_()
    expected = case.reference(logits)
    expected.loss.backward(retain_graph=True)
    spot = case.logits.clone()
    check(case, token_loss_(spot, case.head[2], case.tokens, case.recipe, num_bins=NUM_BINS), expected, 3e-5)
    assert logits.grad is not None and close(spot, logits.grad, TOLERANCE[torch.bfloat16])


def test_rows_more_than_two_to_the_31_elements_apart():
    stride = 2**31 + 8
    torch.use_deterministic_algorithms(False)  # which would fill, and so really take, all of that memory
    logits = torch.empty(stride + 5, dtype=torch.bfloat16).as_strided((2, 5), (stride, 1))
    torch.use_deterministic_algorithms(True)
    case = Case(PPO, torch.bfloat16, [2], 5)
    near = case.logits.clone()
    logits.copy_(near)
    arguments = (case.head[2], case.tokens, case.recipe)
    far = token_loss_(logits, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(far, token_loss_(near, *arguments), strict=True))
    assert torch.equal(logits, near)


def test_logits_that_are_strided():
    case = Case(PPO, torch.float32, [4, 3], 9)
    whole = row_stats(case.logits, case.head[2])
    padded = torch.full((7, 16), float("nan"))[:, :9].copy_(case.logits)
    sparse = torch.full((14, 27), float("nan"))[::2, ::3].copy_(case.logits)
    for logits in (padded, sparse, case.logits.T.contiguous().T, padded.flip(0).flip(0)):
        assert all(torch.equal(a, b) for a, b in zip(row_stats(logits, case.head[2]), whole, strict=True))
    arguments = (case.head[2], case.tokens, case.recipe)
    dense = case.logits.clone()
    assert torch.equal(token_loss_(padded, *arguments).loss, token_loss_(dense, *arguments).loss)
    assert torch.equal(padded, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype):
    case = Case(PPO, dtype, [30, 7, 90], 4001)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            logits = case.logits.clone()
            results.append([*token_loss_(logits, case.head[2], case.tokens, case.recipe), logits])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- Recipes


def test_every_slot_of_the_engine_has_a_kernel():
    reinforce, none = partial(LOSSES["reinforce"]), partial(CORRECTIONS["none"])
    arguments = {"cispo": {"high": 2.0}}
    for name, function in LOSSES.items():
        assert Recipe.of(partial(function, **arguments.get(name, {})), none, None, 0.0) is not None
    for function in CORRECTIONS.values():
        assert Recipe.of(reinforce, partial(function), None, 0.0) is not None
    for function in DIVERGENCES.values():
        assert Recipe.of(reinforce, none, partial(function, coefficient=0.1), 0.0) is not None


def test_a_recipe_holds_the_arguments_in_their_order():
    recipe = Recipe.of(
        partial(LOSSES["cispo"], low=0.25, high=2),
        partial(CORRECTIONS["sequence_mask"], geometric=True),
        partial(DIVERGENCES["k3"], coefficient=0.5),
        0.125,
    )
    assert recipe == Recipe(("cispo", (2.0, 0.25)), ("sequence_mask", (0.5, 2.0, 1.0)), ("k3", (0.5, 0.0)), 0.125)
    assert hash(recipe) is not None
    dual = Recipe.of(partial(LOSSES["ppo_clip"]), CORRECTIONS["none"], None, 0.0)
    assert dual is not None and math.isnan(dual.surrogate[1][2])


def ppo_clip(logprob, proximal, advantage, completions, *, low=0.2, high=0.2, dual=None):
    raise NotImplementedError


def test_what_the_user_wrote_has_no_kernel_whatever_its_name():
    none = partial(CORRECTIONS["none"])
    assert Recipe.of(partial(ppo_clip), none, None, 0.0) is None
    assert Recipe.of(partial(LOSSES["reinforce"]), partial(ppo_clip), None, 0.0) is None
    assert Recipe.of(partial(LOSSES["reinforce"]), none, partial(ppo_clip), 0.0) is None


# ---- What torch asks of an operator

SEQUENCES = Algorithm(
    loss={"name": "gspo"}, correction={"name": "sequence"}, kl={"name": "k2", "coefficient": 0.1}, entropy=0.01
)


def operators(case: Case) -> dict[str, tuple]:
    """Arguments of each of them."""
    t = case.temperature
    hidden, weight, targets = case.head
    logits = case.logits
    hidden, weight, leaf = (x.clone().requires_grad_() for x in (hidden, weight, logits))
    wide = torch.promote_types(case.dtype, torch.float32)
    stats = [torch.randn(case.num_tokens, dtype=wide) for _ in range(4)]
    loss = (*case.tokens.arguments(case.recipe), *case.recipe.arguments(), NUM_BINS, t)
    memory = 3 * case.vocab * 4
    return {
        "row_stats": (leaf, targets, t),
        "row_grad": (logits, targets, *stats, t),
        "token_loss": (leaf, targets, *loss, True, False),
        "token_loss_": (logits.clone(), targets, *loss),
        "linear_stats": (hidden, weight, targets, t, memory),
        "linear_stats_backward": (hidden.detach(), weight.detach(), targets, *stats, t, memory, [True, False]),
        "linear_token_loss": (hidden, weight, targets, *loss, True, memory, [True, True], False),
    }


CASE = Case(SEQUENCES, torch.float32, [4, 2], 7)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", operators(CASE))
def test_opcheck(name: str, dtype: torch.dtype):
    arguments = operators(replace(CASE, dtype=dtype))[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.leeway, name), arguments, test_utils=tests)


def test_gradients_agree_with_differences():
    hidden, weight, targets = replace(CASE, dtype=torch.float64).head
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: row_stats(h @ w.T, targets, temperature=0.7)[:2], (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: linear_stats(h, w, targets, temperature=0.7), (hidden, weight))


@pytest.mark.parametrize("algorithm", ["PPO", "SEQUENCES"])
def test_the_gradient_of_the_loss_agrees_with_differences(algorithm: str):
    case = Case({"PPO": PPO, "SEQUENCES": SEQUENCES}[algorithm], torch.float64, [3, 5], 6, temperature=0.7)
    hidden, weight, targets = case.head
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def at(step: float) -> tuple[Tensor, Tensor]:
        moved = (hidden + step * direction).requires_grad_()
        out = linear_token_loss(moved, weight, targets, case.tokens, case.recipe, temperature=0.7)
        out.loss.backward()
        assert moved.grad is not None
        return out.loss.detach(), moved.grad

    step = 1e-6
    difference = (at(step)[0] - at(-step)[0]) / (2 * step)
    assert torch.isclose(difference, (at(0)[1] * direction).sum(), rtol=1e-6)


def test_a_graph_of_the_loss_runs_backward_once():
    logits = CASE.logits.clone().requires_grad_()
    out = token_loss(logits, CASE.head[2], CASE.tokens, CASE.recipe)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_compiled_without_a_break():
    hidden, weight, targets = CASE.head

    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        logprob, entropy = linear_stats(hidden, weight, targets)
        rows = row_stats(logits, targets)
        alone = token_loss(logits, targets, CASE.tokens, CASE.recipe).loss
        whole = linear_token_loss(hidden, weight, targets, CASE.tokens, CASE.recipe).loss
        return 2 * alone + 3 * whole + (logprob * entropy).sum() + (rows[0] * rows[1]).sum()

    gradients = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, compiled in zip(*gradients, strict=True):
        assert close(compiled, plain, 1e-6)

"""The operators on logits: held to the slots in plain torch, by every option."""

import pytest
import torch
from hypothesis import given, settings
from token_cases import CASES, NUM_BINS, TOLERANCE, Case, check, close

from engine.ops.loss import row_stats, token_loss, token_loss_

pytestmark = pytest.mark.filterwarnings("ignore:algorithm.kl.name = 'k1'")


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """What the operators leave unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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

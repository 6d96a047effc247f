"""Divergences by hand, and what they train: expectations over a whole distribution of three tokens."""

import math

import pytest
import torch

from engine.algorithms.divergences import DIVERGENCES, k1, k2, k3

REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
LOGITS = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("divergence", "value", "slope"),
    [(k1, 0.2, 0.1), (k2, 0.2, 0.2), (k3, 0.1 * (math.exp(-2) + 1), 0.1 * (1 - math.exp(-2)))],
)
def test_value_and_slope_at_a_distance_of_two(divergence, value, slope):
    logprob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    penalty = divergence(logprob, torch.tensor([-3.0], dtype=torch.float64), logprob.detach(), coefficient=0.1)
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(value)
    torch.testing.assert_close(logprob.grad, torch.tensor([slope], dtype=torch.float64))


def kl(a, b):
    return (a.exp() * (a - b)).sum()


@pytest.mark.parametrize("divergence", [k1, k3])
def test_k1_and_k3_average_to_the_kl(divergence):
    policy = LOGITS.log_softmax(0)
    mean = (policy.exp() * divergence(policy, REFERENCE, policy, coefficient=1.0)).sum()
    torch.testing.assert_close(mean, kl(policy, REFERENCE))


@pytest.mark.parametrize(
    ("divergence", "trains"),
    [(k1, lambda policy: 0.0 * policy.sum()), (k2, lambda p: kl(p, REFERENCE)), (k3, lambda p: kl(REFERENCE, p))],
)
def test_the_average_gradient_is_that_of(divergence, trains):
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    sampled = (policy.exp().detach() * divergence(policy, REFERENCE, policy, coefficient=1.0)).sum()
    (actual,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(trains(policy), logits)
    torch.testing.assert_close(actual, expected, atol=1e-15, rtol=1e-12)


def test_k3_keeps_its_digits_near_the_reference():
    d = torch.tensor([1e-3])
    assert k3(d, torch.zeros(1), d, coefficient=1.0).item() == pytest.approx(5e-7, rel=1e-2)


def test_k3_stays_finite():
    far, near = torch.tensor([-500.0]), torch.zeros(1)
    assert k3(far, near, near, coefficient=1.0).isfinite()
    assert k3(near, far, far, coefficient=1.0, corrected=True).isfinite()


@pytest.mark.parametrize(
    ("divergence", "value", "slope"),
    [(k1, 0.6, 0.9), (k2, 0.6, 1.2), (k3, 0.3 * (math.exp(-2) + 1), 0.6)],  # 0.1 * r * (2, 2, e^-2 + 1); r (d + 1)...
)
def test_corrected_value_and_slope_at_a_ratio_of_three(divergence, value, slope):
    logprob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-3.0], dtype=torch.float64)
    proximal = torch.tensor([-1.0 - math.log(3)], dtype=torch.float64)
    penalty = divergence(logprob, reference, proximal, coefficient=0.1, corrected=True)
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(value)
    torch.testing.assert_close(logprob.grad, torch.tensor([slope], dtype=torch.float64))


@pytest.mark.parametrize("divergence", [k1, k3])
def test_corrected_over_the_proximal_policys_tokens_value_and_gradient_are_the_kl(divergence):
    proximal = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    mean = (proximal.exp() * divergence(policy, REFERENCE, proximal, coefficient=1.0, corrected=True)).sum()
    (actual,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(kl(policy, REFERENCE), logits)
    torch.testing.assert_close(mean, kl(policy, REFERENCE))
    torch.testing.assert_close(actual, expected, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_distance_no_penalty(name):
    policy = LOGITS.log_softmax(0)
    assert (DIVERGENCES[name](policy, policy, policy, coefficient=1.0) == 0).all()

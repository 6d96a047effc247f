"""Surrogates: values by hand, gradients in closed form and against finite differences, all in float64."""

import math

import pytest
import torch

from engine.algorithms.losses import (
    LOSSES,
    cispo,
    dppo,
    gspo,
    gspo_token,
    icepop,
    importance,
    ppo_clip,
    reinforce,
    sapo,
)
from engine.algorithms.segments import Segments

DEFAULTS = {"cispo": {"high": 0.5}}
TIGHT = {"low": 0.05, "high": 0.08}
BOUNDS = {"ppo_clip": TIGHT, "gspo": TIGHT, "dppo": TIGHT, "icepop": {"low": 0.9, "high": 1.2}}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def each(num_tokens):
    """Every token its own completion: for the functions that look at tokens alone."""
    return Segments(torch.arange(num_tokens), torch.ones(num_tokens, dtype=torch.float64), num_tokens)


def evaluate(loss, ratios, advantages, completions=None, **arguments):
    """phi, phi' and the clipped tokens at the given ratios; the policy's log-probabilities are -1."""
    logprob = torch.full_like(ratios, -1.0).requires_grad_()
    completions = each(len(ratios)) if completions is None else completions
    phi, clipped = loss(logprob, -1.0 - ratios.log(), advantages, completions, **arguments)
    (slope,) = torch.autograd.grad(phi.sum(), logprob)
    return phi.detach(), slope, clipped.tolist()


def test_reinforce():
    phi, slope, clipped = evaluate(reinforce, tensor(0.5, 3.0), tensor(2.0, -1.0))
    torch.testing.assert_close(phi, tensor(2.0, -1.0))  # -A * -1
    torch.testing.assert_close(slope, tensor(-2.0, 1.0))
    assert clipped == [False, False]


@pytest.mark.parametrize(
    ("r", "advantage", "phi", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),
        (1.5, 2.0, -2.6, 0.0),  # held at 1 + high
        (0.5, 2.0, -1.0, -1.0),  # already worse: free to come back
        (0.5, -2.0, 1.6, 0.0),  # held at 1 - low
        (0.9, -2.0, 1.8, 1.8),
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_ppo_clip(r, advantage, phi, slope):
    values, slopes, clipped = evaluate(ppo_clip, tensor(r), tensor(advantage), low=0.2, high=0.3)
    torch.testing.assert_close(values, tensor(phi))
    torch.testing.assert_close(slopes, tensor(slope))
    assert clipped == [slope == 0.0 and advantage != 0.0]


def test_ppo_clip_dual_bounds_the_loss_of_a_bad_token_that_became_likely():
    ratios, advantages = tensor(2.0, 5.0, 5.0, 0.5), tensor(-1.0, -1.0, 1.0, -1.0)
    phi, slope, clipped = evaluate(ppo_clip, ratios, advantages, low=0.2, high=0.2, dual=3.0)
    torch.testing.assert_close(phi, tensor(2.0, 3.0, -1.2, 0.8))
    torch.testing.assert_close(slope, tensor(2.0, 0.0, 0.0, 0.0))
    assert clipped == [False, True, True, True]
    _, slope, clipped = evaluate(ppo_clip, tensor(1.0), tensor(-1.0), low=0.2, high=0.2, dual=1.0)
    assert slope == 1.0 and clipped == [False]  # on the bound, the whole gradient


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    ratios, advantages = tensor(0.5, 1.0, 3.0, 3.0), tensor(1.0, 1.0, 1.0, -1.0)
    phi, slope, clipped = evaluate(cispo, ratios, advantages, low=0.2, high=1.0)
    torch.testing.assert_close(phi, tensor(0.8, 1.0, 2.0, -2.0))  # -clip(r) * A * -1
    torch.testing.assert_close(slope, tensor(-0.8, -1.0, -2.0, 2.0))
    assert clipped == [True, False, True, True]


def test_cispo_leaves_small_ratios_alone_by_default():
    _, slope, clipped = evaluate(cispo, tensor(0.01), tensor(1.0), high=1.0)
    torch.testing.assert_close(slope, tensor(-0.01))
    assert clipped == [False]


def test_importance_holds_nothing_back():
    phi, slope, clipped = evaluate(importance, tensor(0.1, 9.0), tensor(2.0, -1.0))
    torch.testing.assert_close(phi, tensor(-0.2, 9.0))
    torch.testing.assert_close(slope, tensor(-0.2, 9.0))
    assert clipped == [False, False]


def test_icepop_drops_tokens_outside_its_band():
    ratios, advantages = tensor(0.4, 0.5, 2.0, 5.0, 5.1, 5.1), tensor(1.0, 1.0, -3.0, 1.0, 1.0, -1.0)
    phi, slope, clipped = evaluate(icepop, ratios, advantages, low=0.5 - 1e-12, high=5.0 + 1e-12)
    torch.testing.assert_close(phi, tensor(0.0, -0.5, 6.0, -5.0, 0.0, 0.0))
    torch.testing.assert_close(slope, phi)
    assert clipped == [True, False, False, False, True, True]


def test_icepop_keeps_its_bounds():
    _, slope, clipped = evaluate(icepop, tensor(1.0), tensor(1.0), low=1.0, high=1.0)
    assert slope.tolist() == [-1.0] and clipped == [False]


def test_dppo_drops_by_probability_not_by_ratio():
    policy, proximal = tensor(0.5, 0.5, 0.1, 0.1, 0.8, 0.004), tensor(0.25, 0.25, 0.4, 0.4, 0.9, 0.001)
    advantage = tensor(1.0, -1.0, 1.0, -1.0, -1.0, 1.0)
    logprob = policy.log().requires_grad_()
    phi, clipped = dppo(logprob, proximal.log(), advantage, each(6), low=0.2, high=0.2)
    phi.sum().backward()
    # moved by 1/4 up, 0.3 down, 0.1 down, 0.003 up: a ratio of 4 on a rare token is no distance
    torch.testing.assert_close(phi.detach(), tensor(0.0, 2.0, -0.25, 0.0, 8 / 9, -4.0))
    torch.testing.assert_close(logprob.grad, phi.detach())
    assert clipped.tolist() == [True, False, False, True, False, False]


def test_dppo_bounds_the_two_directions_apart():
    _, _, clipped = evaluate(dppo, tensor(1.5, 0.5), tensor(1.0, -1.0), low=0.4, high=0.1)  # e^-1 less 2/3 or 2 of it
    assert clipped == [True, False]


def test_sapo_fades_with_the_distance():
    e = math.e
    phi, slope, clipped = evaluate(sapo, tensor(2.0, 2.0), tensor(3.0, -3.0), positive=1.0, negative=2.0)
    torch.testing.assert_close(phi, tensor(-12 * e / (1 + e), 6 * e**2 / (1 + e**2)))
    torch.testing.assert_close(slope, tensor(-24 * e / (1 + e) ** 2, 24 * e**2 / (1 + e**2) ** 2))
    assert clipped == [False, False]


# Two completions: ratios 2 and 1/2 and a masked 7, geometric mean 1; ratio 4 alone, clipped.
PAIR = Segments(torch.tensor([0, 0, 0, 1]), tensor(1.0, 1.0, 0.0, 1.0), 2)
PAIR_RATIOS = tensor(2.0, 0.5, 7.0, 4.0)


def test_gspo_clips_completions_not_tokens():
    phi, _, clipped = evaluate(gspo, PAIR_RATIOS, tensor(3.0, 3.0, 3.0, 1.0), PAIR, low=0.1, high=0.1)
    torch.testing.assert_close(phi, tensor(-3.0, -3.0, -3.0, -1.1))
    assert clipped == [False, False, False, True]


def test_gspo_spreads_the_gradient_over_its_completion():
    logprob = tensor(-1.0, -2.0, -1.0, -3.0).requires_grad_()
    advantage, weight = tensor(3.0, 1.0, 5.0, 1.0), tensor(0.5, 0.25, 0.0, 1.0)
    phi, _ = gspo(logprob, logprob.detach() - PAIR_RATIOS.log(), advantage, PAIR, low=0.1, high=0.1)
    (weight * phi).sum().backward()
    # s / n times the sum over the completion of weight * -A: 1/2 * -(0.5 * 3 + 0.25 * 1)
    torch.testing.assert_close(logprob.grad, tensor(-0.875, -0.875, 0.0, 0.0))


def test_gspo_token_gives_each_token_its_own_advantage():
    phi, slope, clipped = evaluate(gspo_token, PAIR_RATIOS, tensor(3.0, 1.0, 5.0, 1.0), PAIR, low=0.1, high=0.1)
    torch.testing.assert_close(phi, tensor(-3.0, -1.0, -5.0, -1.1))
    torch.testing.assert_close(slope, tensor(-3.0, -1.0, -5.0, 0.0))
    assert clipped == [False, False, False, True]


def test_gspo_token_is_gspo_where_a_completion_has_one_advantage_and_one_weight():
    advantage, weight = tensor(3.0, 3.0, 3.0, -2.0), tensor(0.5, 0.5, 0.0, 1.0)
    slopes = []
    for loss in (gspo, gspo_token):
        logprob = tensor(-1.0, -2.0, -1.0, -3.0).requires_grad_()
        phi, _ = loss(logprob, logprob.detach() - PAIR_RATIOS.log(), advantage, PAIR, low=0.1, high=5.0)
        (weight * phi).sum().backward()
        slopes.append(logprob.grad)
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("name", ["reinforce", "importance", "ppo_clip", "icepop", "dppo", "sapo", "gspo"])
def test_gradients_against_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    proximal = -torch.rand(12, generator=generator, dtype=torch.float64)
    logprob = (proximal + 0.3 * torch.randn(12, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(12, generator=generator, dtype=torch.float64)
    mask = (torch.arange(12) % 5 != 0).double()
    completions = Segments(torch.arange(12) // 4, mask, 3)
    arguments = BOUNDS.get(name, {})
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, proximal, advantage, completions, **arguments)[0], (logprob,)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_every_surrogate_has_the_policy_gradient(name):
    logprob = tensor(-1.0, -2.0, -0.5).requires_grad_()
    advantage = tensor(2.0, 2.0, -1.0)
    completions = Segments(torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.float64), 2)
    phi, clipped = LOSSES[name](logprob, logprob.detach(), advantage, completions, **DEFAULTS.get(name, {}))
    phi.sum().backward()
    torch.testing.assert_close(logprob.grad, -advantage)
    assert not clipped.any()


@pytest.mark.parametrize("name", LOSSES)
def test_far_off_policy_everything_stays_finite(name):
    logprob = torch.tensor([-300.0, 0.0], requires_grad=True)
    completions = Segments(torch.arange(2), torch.ones(2), 2)
    arguments = DEFAULTS.get(name, {})
    phi, _ = LOSSES[name](logprob, torch.tensor([0.0, -300.0]), torch.tensor([-1.0, -1.0]), completions, **arguments)
    phi.sum().backward()
    assert phi.isfinite().all() and logprob.grad is not None and logprob.grad.isfinite().all()


def test_the_log_ratio_is_bounded_without_a_gradient_beyond():
    logprob = tensor(0.0).requires_grad_()
    phi, _ = ppo_clip(logprob, tensor(-21.0), tensor(-1.0), each(1))
    phi.sum().backward()
    torch.testing.assert_close(phi.detach(), tensor(math.exp(20)))
    torch.testing.assert_close(logprob.grad, tensor(0.0))

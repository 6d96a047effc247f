"""What the recipes' papers imply for numbers that can be worked by hand, each value as there."""

import numpy as np
import pytest
import torch

from engine.algorithms import advantages as slots
from engine.algorithms.aggregates import sequence_mean, token_mean
from engine.algorithms.losses import gspo, ppo_clip, reinforce
from engine.algorithms.method import Tokens, compose
from engine.algorithms.penalties import difficulty_aware, overlong
from engine.algorithms.segments import Segments
from engine.config import Algorithm


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- generalised advantages --------------------------------------------------------------------------------------

LENGTHS = torch.tensor([3, 1, 4])
BOUNDS = torch.tensor([0, 3, 4, 8])
REWARDS = tensor(0, 0, 1, 0.5, 0, 0, 0, -1)
VALUES = tensor(0.1, 0.4, 0.3, 0.9, 0.2, -0.3, 0.6, 0.5)


def test_at_lambda_1_the_advantage_is_the_return_less_the_value():
    gains, targets = slots.gae(REWARDS, VALUES, BOUNDS, LENGTHS, lambda_policy=1.0, lambda_critic=1.0)
    returns = tensor(1, 1, 1, 0.5, -1, -1, -1, -1)
    torch.testing.assert_close(gains, returns - VALUES)
    torch.testing.assert_close(targets, returns)


def test_at_lambda_0_the_advantage_is_delta():
    gains, targets = slots.gae(REWARDS, VALUES, BOUNDS, LENGTHS, lambda_policy=0.0, lambda_critic=0.0)
    delta = tensor(0.3, -0.1, 0.7, -0.4, -0.5, 0.9, -0.1, -1.5)
    torch.testing.assert_close(gains, delta)
    torch.testing.assert_close(targets, delta + VALUES)


@pytest.mark.parametrize("name", ["gae", "gae_length_adaptive"])
def test_packed_sequences_are_those_alone(name):
    function = slots.BY_TOKEN[name]
    gains, targets = function(REWARDS, VALUES, BOUNDS, LENGTHS)
    for i, (begin, end) in enumerate(zip(BOUNDS[:-1], BOUNDS[1:], strict=True)):
        alone = function(REWARDS[begin:end], VALUES[begin:end], torch.tensor([0, int(end - begin)]), LENGTHS[i : i + 1])
        torch.testing.assert_close((gains[begin:end], targets[begin:end]), alone)


def test_the_length_adaptive_lambda():
    lambdas = slots.adaptive_lambda(torch.tensor([1, 20, 100, 400, 1000, 16000]), 0.05)
    torch.testing.assert_close(lambdas, tensor(0, 0, 0.8, 0.95, 0.98, 0.99875))


def test_a_critic_that_knows_the_chance_leaves_no_advantage_before_the_end():
    """V = 0.3 = the share of solved answers: the expected reward less the value is 0 at every token."""
    values, bounds = torch.full((10,), 0.3, dtype=torch.float64), torch.tensor([0, 10])
    solved, failed = (
        slots.gae(torch.eye(10, dtype=torch.float64)[9] * reward, values, bounds, torch.tensor([10]))[0]
        for reward in (1.0, 0.0)
    )
    torch.testing.assert_close(0.3 * solved + 0.7 * failed, torch.zeros(10, dtype=torch.float64))


def one_answer(length, reward):
    """Rewards, bounds and lengths of a single answer."""
    rewards = torch.zeros(length, dtype=torch.float64)
    rewards[-1] = reward
    return rewards, torch.tensor([0, length]), torch.tensor([length])


@pytest.mark.parametrize(
    ("name", "settings", "mean"),
    [
        ("gae", {"lambda_policy": 0.95}, 0.012),
        ("gae_length_adaptive", {"alpha": 0.05}, 0.030),
        ("gae", {"lambda_policy": 1.0}, 0.150),
    ],
)
def test_what_a_reward_models_bias_makes_of_the_first_half(name, settings, mean):
    """Values that rise from 0 to 0.6 over 1,000 tokens, where 0.3 is right: a gain that is none, the more the longer
    lambda reaches."""
    rewards, bounds, lengths = one_answer(1000, 0.3)
    gains, _ = slots.BY_TOKEN[name](rewards, torch.linspace(0, 0.6, 1000).double(), bounds, lengths, **settings)
    assert gains[:500].mean().item() == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize(("length", "sweeps"), [(100, 9), (400, 27), (1000, 60)])
def test_how_often_targets_must_be_learned_until_the_first_value_is_within_a_tenth(length, sweeps):
    """With lambda 0.95; with 1 once."""
    rewards, bounds, lengths = one_answer(length, 1.0)
    for lam, expected in ((0.95, sweeps), (1.0, 1)):
        values, count = torch.zeros(length, dtype=torch.float64), 0
        while abs(values[0] - 1) > 0.1:
            _, values = slots.gae(rewards, values, bounds, lengths, lambda_critic=lam)
            count += 1
        assert count == expected


# ---- aggregates, losses ------------------------------------------------------------------------------------------


def test_by_token_a_short_answer_weighs_its_share_by_answer_a_half():
    lengths = torch.tensor([1, 9])
    completions = Segments(torch.repeat_interleave(torch.arange(2), lengths), torch.ones(10), 2)
    by_token, by_answer = (f(completions, lengths, 10, 2) for f in (token_mean, sequence_mean))
    assert by_token[0].item() == pytest.approx(1 / 10) and by_answer[0].item() == pytest.approx(1 / 2)


def test_gspo_by_token_weighs_each_answer_in_proportion_to_its_length():
    lengths = torch.tensor([2, 6])
    completions = Segments(torch.repeat_interleave(torch.arange(2), lengths), torch.ones(8).double(), 2)
    logprob, gain = torch.linspace(-2, -1, 8).double(), tensor(*[1.0] * 2, *[-2.0] * 6)
    proximal = logprob - 0.001 * torch.arange(8)
    phi, _ = gspo(logprob, proximal, gain, completions, low=0.1, high=0.1)
    s = torch.stack([part.mean().exp() for part in (logprob - proximal).split([2, 6])])
    expected = (2 * -s[0] + 6 * 2 * s[1]) / 8
    torch.testing.assert_close((token_mean(completions, lengths, 8, 2) * phi).sum(), expected)


def imitation(solved):
    """The term of a method of mu = 0.1 for tokens of -1, -2, -3 in answers of 1 and 2, and its gradient."""
    lengths = torch.tensor([1, 2])
    index = torch.repeat_interleave(torch.arange(2), lengths)
    count = max(1, int(lengths[torch.tensor(solved)].sum()))
    zeros = torch.zeros(3, dtype=torch.float64)
    share = torch.tensor(solved)[index].double() / count
    logprob = tensor(-1, -2, -3).requires_grad_()
    tokens = Tokens(logprob.detach(), zeros, torch.ones(3), index, lengths, solved=share)
    loss, _ = compose(Algorithm(imitation=0.1)).loss(logprob, None, tokens, num_tokens=3, num_sequences=2)
    loss.backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad


def test_imitation_is_the_mean_over_the_tokens_of_solved_answers_alone():
    loss, gradient = imitation([False, True])
    assert loss == pytest.approx(0.1 * 2.5)
    torch.testing.assert_close(gradient, tensor(0, -0.05, -0.05))


def test_imitation_of_nothing_is_0():
    loss, gradient = imitation([False, False])
    assert loss == 0
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("sample", "one", "others"), [(False, 2.646, -0.378), (True, 2.475, -0.354)])
def test_one_of_eight_correct_group_normalised(sample, one, others):
    """The population's deviation is our default; verl takes the sample's."""
    gains = slots.group_norm(tensor(1, *[0] * 7), torch.zeros(8, dtype=torch.int64), sample_std=sample)
    assert [round(gain, 3) for gain in gains.tolist()] == [one] + [others] * 7


def test_on_policy_ppos_gradient_is_that_of_reinforce():
    gain, start = tensor(1.5, -0.5, 0.2), tensor(-1.0, -2.0, -0.3)
    whole = Segments(torch.zeros(3, dtype=torch.int64), torch.ones(3), 1)
    gradients = []
    for loss in (ppo_clip, reinforce):
        logprob = start.clone().requires_grad_()
        loss(logprob, start, gain, whole)[0].sum().backward()
        gradients.append(logprob.grad)
    torch.testing.assert_close(*gradients)


# ---- by segment --------------------------------------------------------------------------------------------------

SCORES, COMPLETION = tensor(0.25, 0.75, 0.5, 1.0, 0.0, 0.5), torch.tensor([0, 0, 0, 1, 2, 2])
GROUP = torch.tensor([0, 0, 1])


def test_process_deltas_sum_to_0_and_a_single_segment_has_0():
    deltas = slots.process_delta(SCORES, COMPLETION, GROUP)
    torch.testing.assert_close(deltas, tensor(-0.25, 0.5, -0.25, 0.0, -0.5, 0.5))
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, COMPLETION, deltas)
    torch.testing.assert_close(sums, tensor(0, 0, 0))


def test_the_released_codes_single_segment_gets_its_score():
    bonus = slots.process_delta_bonus(SCORES, COMPLETION, GROUP)
    torch.testing.assert_close(bonus, tensor(-0.25, 0.5, -0.25, 1.0, -0.5, 0.5))


def test_process_ablations():
    end, group = (f(SCORES, COMPLETION, GROUP) for f in (slots.process_end, slots.process_group))
    torch.testing.assert_close(end, tensor(-0.25, 0.25, 0, 0, -0.5, 0))
    torch.testing.assert_close(group, SCORES - tensor(*[2.5 / 4] * 4, 0.25, 0.25))


# ---- difficulty-aware length penalty -----------------------------------------------------------------------------

LIMIT = {"limit": 16384, "buffer": 4096}


def group(share, length=16000, *, failed_length=16000, truncated=False):
    """Eight answers, the first `8 * share` solved: scores, lengths, truncated, solved."""
    solved = np.arange(8) < 8 * share
    lengths = np.where(solved, length, failed_length)
    return solved.astype(float), lengths, np.full(8, truncated), solved


def test_a_long_answer_costs_more_the_easier_its_prompt():
    assert overlong(*group(1), **LIMIT)[0] - 1 == -0.90625
    assert difficulty_aware(*group(1 / 8), **LIMIT)[0] == pytest.approx(0.8867, abs=1e-4)
    assert difficulty_aware(*group(1), **LIMIT)[0] == 0.09375


def test_what_was_cut_off_or_failed_costs_what_it_costs_without_the_difficulty():
    cut = group(1 / 8, truncated=True)
    np.testing.assert_array_equal(difficulty_aware(*cut, **LIMIT), overlong(*cut, **LIMIT))
    failed = group(1 / 8)
    np.testing.assert_array_equal(difficulty_aware(*failed, **LIMIT)[1:], overlong(*failed, **LIMIT)[1:])


def test_what_is_short_enough_costs_nothing():
    short = group(1 / 2, length=12288, failed_length=12288)
    np.testing.assert_array_equal(difficulty_aware(*short, **LIMIT), short[0])


def test_a_group_solved_as_a_whole_still_teaches_to_be_brief():
    scores, lengths, cut, solved = group(1)
    lengths = np.where(np.arange(8) < 4, 12288, 14336)
    assert difficulty_aware(scores, lengths, cut, solved, **LIMIT).tolist() == [1.0] * 4 + [0.5] * 4


def test_gamma_and_the_weight_of_failures():
    scores = difficulty_aware(*group(1 / 4), **LIMIT, gamma=2.0, failed=0.5)
    np.testing.assert_allclose(scores[[0, 7]], [1 - 0.90625 / 16, -0.90625 / 2])

"""Advantages by hand: two groups, interleaved, of three and two completions."""

import pytest
import torch

from engine.algorithms.advantages import (
    BY_COMPLETION,
    batch_norm,
    group_mean,
    group_mean_batch_norm,
    group_norm,
    leave_one_out,
    none,
)

REWARDS = torch.tensor([1.0, 4.0, 0.0, 8.0, 2.0], dtype=torch.float64)
GROUP = torch.tensor([0, 1, 0, 1, 0])  # rewards 1, 0, 2 and 4, 8


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_none_is_the_reward():
    close(none(REWARDS, GROUP), [1.0, 4.0, 0.0, 8.0, 2.0])


def test_group_mean():
    close(group_mean(REWARDS, GROUP), [0.0, -2.0, -1.0, 2.0, 1.0])


def test_group_norm_divides_by_the_population_deviation():
    deviation = (2 / 3) ** 0.5
    close(group_norm(REWARDS, GROUP, eps=1e-12), [0.0, -1.0, -1 / deviation, 1.0, 1 / deviation])


def test_group_norm_by_the_sample_deviation():
    deviation = 8**0.5  # of 4 and 8: sum of squares 8, divided by 1
    close(group_norm(REWARDS, GROUP, eps=1e-12, sample_std=True), [0.0, -2 / deviation, -1.0, 2 / deviation, 1.0])


def test_group_norm_adds_eps_to_the_deviation():
    close(group_norm(REWARDS, GROUP, eps=2.0)[1:4:2], [-0.5, 0.5])


def test_leave_one_out_is_the_distance_from_the_mean_of_the_others():
    close(leave_one_out(REWARDS, GROUP), [1 - 2 / 2, 4 - 8.0, 0 - 3 / 2, 8 - 4.0, 2 - 1 / 2])


def test_batch_norm_is_over_all_groups():
    deviation = 8**0.5  # 1, 4, 0, 8, 2: mean 3, squares 4 + 1 + 9 + 25 + 1 = 40 of 5
    close(batch_norm(REWARDS, GROUP, eps=1e-12), [x / deviation for x in (-2.0, 1.0, -3.0, 5.0, -1.0)])


def test_group_mean_batch_norm_takes_the_groups_mean_first():
    deviation = 2**0.5  # 0, -2, -1, 2, 1: squares 10 of 5
    close(group_mean_batch_norm(REWARDS, GROUP, eps=1e-12), [x / deviation for x in (0.0, -2.0, -1.0, 2.0, 1.0)])


@pytest.mark.parametrize("name", ["group_mean", "group_norm", "leave_one_out"])
def test_a_uniform_group_and_a_group_of_one_have_no_advantage(name):
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.0], dtype=torch.float64)
    advantages = BY_COMPLETION[name](rewards, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(advantages, torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", BY_COMPLETION)
def test_no_completions(name):
    assert BY_COMPLETION[name](torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)

"""Importance weights by hand: rho = 1/4, 2 and 8 in one completion, 3 and a masked 100 in another."""

import math

import pytest
import torch

from engine.algorithms.corrections import CORRECTIONS, decoupled, icepop, none, sequence, sequence_mask, tis
from engine.algorithms.segments import Segments

RHO = torch.tensor([0.25, 2.0, 8.0, 3.0, 100.0], dtype=torch.float64)
BEHAVIOUR = torch.tensor([-4.0, -3.0, -2.5, -2.0, -6.0], dtype=torch.float64)
PROXIMAL = BEHAVIOUR + RHO.log()
MASK = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
COMPLETIONS = Segments(torch.tensor([0, 0, 0, 1, 1]), MASK, 2)


def close(actual, expected):
    torch.testing.assert_close(actual * MASK, torch.tensor(expected, dtype=torch.float64))


def test_none():
    close(none(PROXIMAL, BEHAVIOUR, COMPLETIONS), [1, 1, 1, 1, 0])


def test_decoupled_is_the_whole_ratio():
    close(decoupled(PROXIMAL, BEHAVIOUR, COMPLETIONS), [0.25, 2, 8, 3, 0])


def test_tis_truncates_above_only():
    close(tis(PROXIMAL, BEHAVIOUR, COMPLETIONS, cap=2.5), [0.25, 2, 2.5, 2.5, 0])


def test_icepop_drops_on_both_sides():
    close(icepop(PROXIMAL, BEHAVIOUR, COMPLETIONS, low=0.5, high=5.0), [0, 2, 0, 3, 0])


def test_icepop_keeps_its_bounds():
    same = torch.full((5,), -1.0, dtype=torch.float64)
    close(icepop(same, same, COMPLETIONS, low=1.0, high=1.0), [1, 1, 1, 1, 0])


def test_sequence_is_the_product_over_unmasked_tokens():
    close(sequence(PROXIMAL, BEHAVIOUR, COMPLETIONS, cap=10.0), [4, 4, 4, 3, 0])  # 1/4 * 2 * 8 = 4


def test_sequence_is_truncated():
    close(sequence(PROXIMAL, BEHAVIOUR, COMPLETIONS, cap=3.5), [3.5, 3.5, 3.5, 3, 0])


def test_sequence_without_a_cap_does_not_overflow():
    assert sequence(torch.zeros(5), torch.full((5,), -400.0), COMPLETIONS, cap=math.inf).isfinite().all()


def test_sequence_by_the_geometric_mean():
    mean = 4 ** (1 / 3)
    close(sequence(PROXIMAL, BEHAVIOUR, COMPLETIONS, cap=10.0, geometric=True), [mean, mean, mean, 3, 0])


def test_sequence_mask_drops_whole_completions_on_both_sides():
    close(sequence_mask(PROXIMAL, BEHAVIOUR, COMPLETIONS, low=0.5, high=3.5), [0, 0, 0, 3, 0])  # 4 and 3
    close(sequence_mask(BEHAVIOUR, PROXIMAL, COMPLETIONS, low=0.3, high=3.5), [0, 0, 0, 1 / 3, 0])  # 1/4 and 1/3


def test_sequence_mask_keeps_its_bounds():
    same = torch.full((5,), -1.0, dtype=torch.float64)
    close(sequence_mask(same, same, COMPLETIONS, low=1.0, high=1.0), [1, 1, 1, 1, 0])


def test_sequence_mask_by_the_geometric_mean():
    mean = 4 ** (1 / 3)
    close(sequence_mask(PROXIMAL, BEHAVIOUR, COMPLETIONS, high=2.0, geometric=True), [mean, mean, mean, 0, 0])


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_carry_no_gradient_and_are_one_where_the_policies_agree(name):
    policy = BEHAVIOUR.clone().requires_grad_()
    w = CORRECTIONS[name](policy, BEHAVIOUR, COMPLETIONS)
    assert not w.requires_grad
    torch.testing.assert_close(w, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_stay_finite(name):
    w = CORRECTIONS[name](
        torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0]), Segments(torch.tensor([0, 1]), torch.ones(2), 2)
    )
    assert w.isfinite().all()

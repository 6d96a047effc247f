"""Token weights by hand: completions of 2 tokens, of 1 token and a stale one, and of none that train."""

import torch

from engine.algorithms.aggregates import constant, sequence_mean, sequence_sum, token_mean
from engine.algorithms.segments import Segments

MASK = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
COMPLETIONS = Segments(torch.tensor([0, 0, 1, 1, 2]), MASK, 3)
LENGTHS = torch.tensor([2, 2, 0])  # the stale token counts, the observation of the third completion does not


def weigh(aggregate, **arguments):
    return aggregate(COMPLETIONS, LENGTHS, 10, 5, **arguments)  # in an update of 10 tokens, 5 completions


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_token_mean():
    close(weigh(token_mean), [0.1, 0.1, 0.1, 0.0, 0.0])


def test_sequence_mean_keeps_stale_tokens_in_the_denominator():
    close(weigh(sequence_mean), [0.1, 0.1, 0.1, 0.0, 0.0])  # 1 / (2 * 5)


def test_sequence_mean_gives_each_completion_the_same_total():
    completions = Segments(torch.tensor([0, 0, 0, 1]), torch.ones(4, dtype=torch.float64), 2)
    omega = sequence_mean(completions, torch.tensor([3, 1]), 4, 2)
    close(completions.sum(omega), [0.5, 0.5])


def test_sequence_sum():
    close(weigh(sequence_sum), [0.2, 0.2, 0.2, 0.0, 0.0])


def test_constant():
    close(weigh(constant, length=50), [0.004, 0.004, 0.004, 0.0, 0.0])

"""Drawing tokens: the distribution, truncation by hand, and keys."""

import numpy as np
import torch

from engine.generators.sampling import draw, stream_key, uniform


def one(logits: list[float], number: float, **options: list[float]) -> tuple[int, float]:
    tensors = {
        name: torch.tensor(options[name]) if name in options else None for name in ("temperature", "top_p", "top_k")
    }
    tokens, logprobs = draw(torch.tensor([logits]), torch.tensor([number], dtype=torch.float64), **tensors)
    return int(tokens), float(logprobs)


def test_the_token_is_where_the_cumulative_probability_passes_the_number() -> None:
    logits = np.log([0.2, 0.5, 0.3]).tolist()
    assert [one(logits, number)[0] for number in (0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-52)] == [0, 0, 1, 1, 2, 2]
    assert np.isclose(one(logits, 0.5)[1], np.log(0.5))


def test_an_impossible_token_is_never_drawn() -> None:
    assert one([-np.inf, 0.0, -np.inf], 0.0)[0] == 1
    assert one([-np.inf, 0.0, -np.inf], 1 - 2**-52)[0] == 1


def test_temperature_divides_the_logits() -> None:
    # softmax(ln 9 / 2, 0) = 3/4, 1/4
    token, logprob = one([float(np.log(9.0)), 0.0], 0.8, temperature=[2.0])
    assert token == 1 and np.isclose(logprob, np.log(0.25))


def test_top_k_keeps_the_likeliest_and_the_logprob_is_that_before_truncation() -> None:
    logits = np.log([0.1, 0.6, 0.3]).tolist()
    drawn = [one(logits, number, top_k=[2]) for number in (0.0, 0.66, 0.67, 0.99)]
    assert [token for token, _ in drawn] == [1, 1, 2, 2]
    assert np.isclose(drawn[0][1], np.log(0.6))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = np.log([0.1, 0.6, 0.3]).tolist()
    assert {one(logits, number, top_p=[0.59])[0] for number in np.linspace(0, 0.999, 50)} == {1}
    assert {one(logits, number, top_p=[0.61])[0] for number in np.linspace(0, 0.999, 50)} == {1, 2}


def test_truncation_of_one_row_leaves_the_others() -> None:
    logits = torch.tensor(np.log([[0.4, 0.6], [0.4, 0.6]]))
    tokens, _ = draw(
        logits, torch.tensor([0.1, 0.1], dtype=torch.float64), temperature=None, top_p=None, top_k=torch.tensor([1, 0])
    )
    assert tokens.tolist() == [1, 0]


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = np.array([0.05, 0.15, 0.3, 0.5])
    num = 20_000
    numbers = uniform(np.full(num, stream_key(0, "train", 1, 2)), np.arange(num))
    logits = torch.tensor(np.log(probabilities)).expand(num, -1)
    tokens, _ = draw(logits, torch.from_numpy(numbers), temperature=None, top_p=None, top_k=None)
    shares = np.bincount(tokens.numpy(), minlength=4) / num
    assert np.abs(shares - probabilities).max() < 4 * np.sqrt(0.25 / num)  # four standard errors


def test_numbers_are_splitmix64() -> None:
    # The first outputs of the reference implementation from state 0.
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [(value >> 12) * 2.0**-52 for value in outputs]
    assert uniform(np.zeros(3, np.uint64), np.arange(3)).tolist() == expected


def test_every_part_of_the_key_counts() -> None:
    base = (0, "train", 1, 2)
    keys = {stream_key(*base), stream_key(1, *base[1:]), stream_key(0, "eval", 1, 2), stream_key(0, "train", 2, 2)}
    assert len(keys | {stream_key(0, "train", 1, 3)}) == 5
    assert stream_key(0, "train", 12, 3) != stream_key(0, "train", 1, 23)

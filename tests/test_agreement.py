"""The dense reward of agreement with the answer, by hand."""

import pytest

from rewards.agreement import agrees
from rewards.table import resolve


@pytest.mark.parametrize(
    ("completion", "score", "solved"),
    [("abcd", 1.0, True), (" abcd\n", 1.0, True), ("abxd", 0.5, False), ("ab", 0.5, False), ("", 0.0, False),
     ("abcdabcd", 0.5, False), ("xbcd", 0.0, False)],
)  # fmt: skip
def test_it_is_the_share_before_the_first_difference(completion, score, solved):
    verdict = agrees("p", completion, "abcd")
    assert (verdict.score, verdict.solved, verdict.segments) == (score, solved, [])


def test_parts_are_scored_with_all_before_them():
    verdict = agrees("p", "abxd", "abcd", parts=2)
    assert [(segment.end, segment.score) for segment in verdict.segments] == [
        (2, 0.5),
        (4, 0.5),
    ]
    assert [each.end for each in agrees("p", "abc", "abcd", parts=9).segments] == [1, 2, 3]
    assert [each.end for each in agrees("p", "", "abcd", parts=2).segments] == [0]


def test_an_empty_answer_is_no_reference():
    with pytest.raises(ValueError, match="nothing in the answer"):
        agrees("p", "a", " ")


def test_it_is_a_reward_by_name():
    assert resolve("agreement", {"parts": 2})("p", "ab", "ab").segments

"""The rewards of the benchmark, in plain Python: ours and a peer, each in its own environment, call the same ones."""

from typing import Any


def exact(prompt: str, completion: str, answer: str, **fields: Any) -> float:
    """1 where the completion is the answer, white space around both left out; else 0."""
    return float(completion.strip() == answer.strip())


def share(prompt: str, completion: str, answer: str, **fields: Any) -> float:
    """The completion's characters that occur in the answer, as a share of the longer one's length.

    A model with random weights earns some from the first step on, no group has equal rewards throughout, and to end
    early costs.
    """
    return sum(character in answer for character in completion) / max(len(completion), len(answer), 1)


TABLE = {"exact": exact, "share": share}

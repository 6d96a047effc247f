"""The completion is the answer, letter for letter."""

from typing import Any

from rewards.verdict import Verdict, brief


def exact(prompt: str, completion: str, answer: str, **fields: Any) -> Verdict:
    """1 where `completion` equals `answer`, white space around both left out; else 0."""
    given = completion.strip()
    solved = given == answer.strip()
    return Verdict(float(solved), solved, evidence={"parsed": brief(given), "expected": brief(answer)})

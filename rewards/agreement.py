"""How far the completion agrees with the answer: a dense reward where the answer is one text, and needs no judge."""

from typing import Any

from rewards.options import Natural
from rewards.verdict import Segment, Verdict, brief


def agrees(prompt: str, completion: str, answer: str, *, parts: Natural = 0, **fields: Any) -> Verdict:
    """The characters before the first that differs, by the length of the longer one; 1, and solved, where both are
    equal, white space around them left out.

    With `parts` above 0 the completion is also divided into that many parts, or as many as it has characters, of which
    each is scored with all before it. Raises `ValueError` for an empty answer.
    """
    expected = answer.strip()
    if not expected:
        raise ValueError("there is nothing in the answer to agree with")
    given = completion.strip()
    score = agreement(given, expected)
    count = max(1, min(parts, len(completion)))
    ends = [len(completion) * (part + 1) // count for part in range(count)] if parts > 0 else []
    segments = [Segment(end, agreement(completion[:end].strip(), expected)) for end in ends]
    evidence = {"parsed": brief(given), "expected": brief(expected)}
    return Verdict(score, given == expected, evidence=evidence, segments=segments)


def agreement(given: str, expected: str) -> float:
    length = next((place for place, pair in enumerate(zip(given, expected, strict=False)) if pair[0] != pair[1]), None)
    common = min(len(given), len(expected)) if length is None else length
    return common / max(len(given), len(expected))

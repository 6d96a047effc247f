"""Mathematical equality by math-verify: 1/2 is 0.5 is \\boxed{\\frac{1}{2}}."""

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from rewards.verdict import Verdict, brief

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off


def equals(prompt: str, completion: str, answer: str, **fields: Any) -> Verdict:
    """1 where what math-verify finds in `completion` (all that is in \\boxed{}, or else the last value) equals
    `answer`; else 0.

    math-verify's own time limits are off: one clock rules, the scorer's. Raises `ValueError` for an `answer` that
    cannot be read.
    """
    gold = read_gold(answer)
    given = parse(completion, parsing_timeout=0)
    solved = bool(verify(gold, given, timeout_seconds=0))
    parsed = str(given[0]) if given else ""
    return Verdict(float(solved), solved, evidence={"parsed": brief(parsed), "expected": brief(answer)})


@lru_cache(maxsize=256)
def read_gold(answer: str) -> list[Any]:
    """`answer` parsed, also where it is LaTeX without its dollars; the completions of a group share it."""
    for text in (answer, f"${answer}$"):
        if parsed := parse(text, parsing_timeout=0):
            return parsed
    raise ValueError(f"the answer {answer!r} is no mathematics that math-verify can read")

"""The completion has the wanted form."""

import re
from typing import Any

from rewards.table import Reward
from rewards.verdict import Verdict, brief


def form(*, pattern: str) -> Reward:
    """The reward that is 1 where the regular expression `pattern` matches the whole completion, white space around it
    left out; else 0. `.` matches line breaks too. Raises `ValueError` for a pattern that is none."""
    try:
        wanted = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern = {pattern!r}: no regular expression: {error}") from error

    def matches(prompt: str, completion: str, answer: str = "", **fields: Any) -> Verdict:
        found = wanted.fullmatch(completion.strip()) is not None
        return Verdict(float(found), found, evidence={"parsed": brief(completion.strip())})

    return matches

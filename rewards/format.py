"""The completion has the wanted form."""

import re
from typing import Any

from rewards.verdict import Verdict, brief


def matches(prompt: str, completion: str, answer: str, *, pattern: str, **fields: Any) -> Verdict:
    """1 where the regular expression `pattern` matches the whole completion, white space around it left out; else 0.
    `.` matches line breaks too. Raises `re.error` for a pattern that is none."""
    found = re.fullmatch(pattern, completion.strip(), re.DOTALL)
    return Verdict(float(found is not None), found is not None, evidence={"parsed": brief(completion.strip())})

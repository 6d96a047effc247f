"""The tasks of reasoning-gym, each with its own scorer.

An entry is named by (task, options, index), where the options hold the data set's seed and size, and is made again
where it is needed: entries hold tuples, sets and arrays that would not survive a message.
"""

import re
from functools import lru_cache
from typing import Any

import msgspec
import reasoning_gym

from rewards.verdict import Verdict, brief


def task_score(
    prompt: str, completion: str, answer: str, *, task: str, options: dict[str, Any], index: int, **fields: Any
) -> Verdict:
    """The score in [0, 1] that the task gives to what stands in the last <answer></answer> of `completion`, or to all
    of it where there is none. 1 counts as solved."""
    given = (re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL) or [completion])[-1].strip()
    key = msgspec.json.encode(options, order="sorted")
    score = float(_dataset(task, key).score_answer(given, _entry(task, key, index)))
    return Verdict(score, score >= 1.0, evidence={"parsed": brief(given), "expected": brief(answer)})


def entry(task: str, options: dict[str, Any], index: int) -> dict[str, Any]:
    """The data set's item `index`: question, answer, metadata.

    Raises `ValueError` for an unknown task, and what the task raises (AssertionError, TypeError, ValueError) for
    options that it refuses.
    """
    return _entry(task, msgspec.json.encode(options, order="sorted"), index)


@lru_cache(maxsize=16)
def _dataset(task: str, options: bytes) -> Any:
    return reasoning_gym.create_dataset(task, **msgspec.json.decode(options))


@lru_cache(maxsize=64)  # a group's completions share one entry
def _entry(task: str, options: bytes, index: int) -> dict[str, Any]:
    return _dataset(task, options)[index]

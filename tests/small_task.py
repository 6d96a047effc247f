"""The domains of tests/job.toml: prompts without an end, and rewards that differ within almost every group."""

import time
from typing import Any


def draw(seed: int, index: int) -> dict[str, str]:
    return {"prompt": f"{(seed + 7919 * index) % 100000:05d}=", "answer": str(index % 10)}


def spell(seed: int, index: int) -> dict[str, str]:
    number = seed + 7919 * index
    word = "".join(chr(ord("a") + number // 26**place % 26) for place in range(4))
    return {"prompt": f"{word}=", "answer": word[::-1]}


def always(seed: int, index: int) -> dict[str, str]:
    return {"prompt": "1=", "answer": "1"}


def reward(prompt: str, completion: str, answer: str, *, delay_s: float = 0.0, **fields: Any) -> float:
    """The share of the completion's characters that are small letters; 1 also where it is empty. Takes `delay_s`."""
    time.sleep(delay_s)
    return sum(character.islower() for character in completion) / len(completion) if completion else 1.0

"""A domain whose rewards mean nothing: quick to judge, some groups uniform, some completions beyond judgement."""

import zlib
from typing import Any


def draw(seed: int, index: int) -> dict[str, str]:
    return {"prompt": f"{index:05d}=", "answer": str(seed)}


def reward(prompt: str, completion: str, answer: str, **fields: Any) -> float:
    """1 for one text in two, 0 for most others; raises for one in twelve."""
    number = zlib.crc32(f"{prompt}{completion}".encode()) % 12
    if number == 0:
        raise ValueError("beyond judgement")
    return float(number % 2)

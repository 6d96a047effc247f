"""Tasks of which it is known what an answer's length is worth, for effects that are about length."""

import hashlib
import math
from random import Random
from typing import Any

from rewards.agreement import agreement
from rewards.verdict import Segment, Verdict

LETTERS = "abcdefgh"
CHANCES = {  # of a right answer, by the share of the token limit that it takes
    "easy": lambda share: 1 - math.exp(-10 * share),
    "steep": lambda share: 0.9 / (1 + math.exp(-25 * (share - 0.7))),
    "gentle": lambda share: 0.6 * share,
    "likely": lambda share: 0.9,
    "unlikely": lambda share: 0.1,
}


def thinking(seed: int, index: int, *, mark: str, shortest: int, longest: int) -> dict[str, Any]:
    """A prompt that begins with its kind's `mark`; demonstrations are of `shortest` to `longest` letters."""
    random = Random(f"{seed} {index}")
    asked = "".join(random.choices(LETTERS, k=4))
    thought = "".join(random.choices(LETTERS, k=random.randint(shortest, longest)))
    return {"prompt": f"{mark}{asked}=", "answer": "none", "demonstration": thought}


def thought(prompt: str, completion: str, answer: str, *, chance: str, limit: int, **fields: Any) -> float:
    """1 with a chance that follows from the length alone, always alike for the same letters; 0 where cut off."""
    drawn = hashlib.blake2b(f"{prompt}{completion}".encode(), digest_size=8).digest()
    luck = int.from_bytes(drawn, "big") / 2**64
    return float(len(completion) < limit and luck < CHANCES[chance](len(completion) / limit))


def rambling(seed: int, index: int, *, letters: list[int], dots: list[int], slips: float = 0.0) -> dict[str, Any]:
    """A word to be spelled backwards, which demonstrations do after some dots that are good for nothing; with a chance
    of `slips` each of their letters is any."""
    random = Random(f"{seed} {index}")
    word = "".join(random.choices(LETTERS, k=random.randint(*letters)))
    shown = "".join(random.choice(LETTERS) if random.random() < slips else letter for letter in word[::-1])
    return {"prompt": f"{word}=", "answer": word[::-1], "demonstration": "." * random.randint(*dots) + shown}


def capitals(seed: int, index: int, *, letters: int, slips: float) -> dict[str, Any]:
    """A word to be spelled backwards in capitals; demonstrations have each letter small with a chance of `slips`."""
    random = Random(f"{seed} {index}")
    word = "".join(random.choices(LETTERS, k=letters))
    shown = "".join(letter if random.random() < slips else letter.upper() for letter in word[::-1])
    return {"prompt": f"{word}=", "answer": word[::-1].upper(), "demonstration": shown}


def after_dots(prompt: str, completion: str, answer: str, **fields: Any) -> float:
    """1 where what follows the leading dots is the answer."""
    return float(completion.lstrip(".") == answer)


def sound(prompt: str, completion: str, answer: str, *, parts: int, **fields: Any) -> Verdict:
    """As the reward `agreement` with `parts`, but what breaks off is scored by how much of it is right, not by how far
    it has come: the letters before the first wrong one by all that stand there."""
    count = max(1, min(parts, len(completion)))
    ends = [len(completion) * (part + 1) // count for part in range(count)]
    scores = [agreement(completion[:end], answer[:end]) if end else 0.0 for end in ends[:-1]]
    score = agreement(completion, answer)
    segments = [Segment(end, part) for end, part in zip(ends, [*scores, score], strict=True)]
    return Verdict(score, completion == answer, segments=segments)

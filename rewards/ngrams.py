"""Runs of words that two texts share."""

import re

import xxhash

WORD = re.compile(r"\w+")


def ngrams(text: str, n: int) -> set[int]:
    """A 64-bit hash of every run of `n` words of `text`, letters' case and all but letters, digits and _ left out; of
    all its words where it has fewer."""
    words = WORD.findall(text.lower())
    runs = [words[start : start + n] for start in range(max(1, len(words) - n + 1))] if words else []
    return {xxhash.xxh3_64_intdigest(" ".join(run).encode()) for run in runs}

"""Whether what a program gave is what was expected."""

from decimal import Decimal, InvalidOperation
from typing import Any

SLACK_BYTES = 1 << 16


def longest(expected: int) -> int:
    """The bytes that an answer of about `expected` bytes may have; of more, nothing is looked at."""
    return 4 * expected + SLACK_BYTES


def lines(given: str, expected: str, tolerance: float) -> bool:
    """Line by line and word by word; white space at the ends of lines and of the text does not count."""
    ours, theirs = ([line.split() for line in text.strip().split("\n")] for text in (given, expected))
    return len(ours) == len(theirs) and all(_words(*pair, tolerance) for pair in zip(ours, theirs, strict=True))


def words(given: str, expected: str, tolerance: float) -> bool:
    """Word by word, however they are spread over lines."""
    return _words(given.split(), expected.split(), tolerance)


def exact(given: str, expected: str, tolerance: float) -> bool:
    """Letter by letter."""
    return given == expected


TEXTS = {"lines": lines, "words": words, "exact": exact}


def _words(given: list[str], expected: list[str], tolerance: float) -> bool:
    return len(given) == len(expected) and all(
        ours == theirs or _numbers(ours, theirs, tolerance) for ours, theirs in zip(given, expected, strict=True)
    )


def _numbers(given: str, expected: str, tolerance: float) -> bool:
    """Whether both words are numbers, and the same one."""
    try:
        if tolerance:
            return close(float(given), float(expected), tolerance)
        return Decimal(given) == Decimal(expected)
    except (ValueError, InvalidOperation):
        return False


def close(given: float, expected: float, tolerance: float) -> bool:
    """|given - expected| <= tolerance * max(1, |expected|)."""
    try:
        return given == expected or abs(given - expected) <= tolerance * max(1.0, abs(expected))
    except OverflowError:  # an integer beyond all floats
        return False


def values(given: Any, expected: Any, tolerance: float) -> bool:
    """Equality of Python values, in which a tuple is as good as a list; numbers may differ by `tolerance` where one of
    them is a float. It goes as deep as `expected` does."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(given, list | tuple)
            and len(given) == len(expected)
            and all(values(*pair, tolerance) for pair in zip(given, expected, strict=True))
        )
    if isinstance(expected, dict):
        if isinstance(given, dict) and given.keys() != expected.keys():
            given = {str(key): value for key, value in given.items()}  # the keys of JSON are texts
        return (
            isinstance(given, dict)
            and given.keys() == expected.keys()
            and all(values(given[key], expected[key], tolerance) for key in expected)
        )
    if type(given) in (int, float) and type(expected) in (int, float):
        return given == expected or (float in (type(given), type(expected)) and close(given, expected, tolerance))
    return given == expected

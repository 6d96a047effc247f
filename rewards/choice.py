"""The letter of a multiple choice in an answer."""

import re

ONE = re.compile(r"\(?([A-J])\)?")  # an answer that is a letter and nothing else
MARKS = r"[\s$]*(?:(?i:option|choice)\s+)?(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?[(\[*]*"
# What may stand behind a letter; behind another word it is an article or a pronoun.
AFTER = r"(?=[\s$]*(?:\Z|[)\].:,;}*]|\s[-–—]|\\(?:text|quad|[,;: ])|\d|(?:and|or|because|since)\b))"
BEGINNING = re.compile(rf"{MARKS}([A-J]{AFTER}|[a-j](?=[\s$)\]}}*.]*\Z|[)\].:]))(?![0-9^_+/=({{]|\*[A-Za-z0-9])")
ANOTHER = re.compile(rf"[)\]*}}\s$.]*(?:,|;|/|&|\band\b|\bor\b)+{MARKS}([A-HJ])(?![A-Za-z0-9])")
NAMED = re.compile(r"\b(?i:option|choice|answer)(?:\s+is)?\s*:?\s*[(\[*]*([A-J])(?![A-Za-z0-9'’])")


def is_choice(answer: str) -> bool:
    return ONE.fullmatch(answer.strip()) is not None


def chosen(text: str) -> str | None:
    """The letter that `text` begins with, or else the last that it calls an option, a choice or the answer; None where
    it begins with two."""
    found = BEGINNING.match(text)
    if found is None:
        named = NAMED.findall(text)
        return named[-1] if named else None
    other = ANOTHER.match(text, found.end())
    return None if other and other[1] != found[1].upper() else found[1].upper()

"""What makes a row of a data set unfit for training, seen from the row alone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards.answer import boxed
from rewards.ngrams import WORD, ngrams
from rewards.options import fitted
from rewards.rows import Row, read_rows, text_of
from rewards.spelling import suggestion
from rewards.table import load
from rewards.verdict import Verdict

Screen = Callable[[Row], str]  # -> why the row is dropped; empty where it is kept

ANSWERS: dict[str, re.Pattern[str]] = {  # kinds of answers; the first that matches counts
    "none": re.compile(r"\s*"),
    "choice": re.compile(r"\(?[A-J]\)?\.?"),
    "boolean": re.compile(r"true|false|yes|no", re.IGNORECASE),
    "integer": re.compile(r"[-+]?\d{1,3}(,\d{3})+|[-+]?\d+"),
    "decimal": re.compile(r"[-+]?\d*\.\d+"),
    "fraction": re.compile(r"[-+]?\s*\\[dt]?frac\s*\{[-+]?\d+\}\s*\{\d+\}|[-+]?\d+\s*/\s*\d+"),
    "several": re.compile(r".*([,;]|\\text\s*\{\s*(and|or)\s*\}|\b(and|or)\b).*", re.DOTALL),
    "text": re.compile(r".*(?<![\\A-Za-z])[A-Za-z]{4,}.*", re.DOTALL),
    "expression": re.compile(r".*", re.DOTALL),
}


def answer_kind(answer: str) -> str:
    """The kind of a mathematical answer, by a name of `ANSWERS`; dollars and a \\boxed{} around it do not count."""
    bare = answer.strip().strip("$").strip()
    boxes = boxed(bare)
    bare = boxes[0] if len(boxes) == 1 else bare
    return next(kind for kind, pattern in ANSWERS.items() if pattern.fullmatch(bare))


def length(*, column: str = "prompt", unit: str = "words", least: int = 0, most: int = 1 << 62) -> Screen:
    """Drops rows whose `column` has fewer than `least` or more than `most` words or characters."""
    if unit not in ("words", "characters"):
        raise ValueError(f"unit = {unit!r}: allowed are words, characters")

    def screen(row: Row) -> str:
        text = column_of(row, column)
        size = len(text) if unit == "characters" else len(WORD.findall(text))
        return "" if least <= size <= most else f"{size} {unit}"

    return screen


def answer(*, kinds: list[str], column: str = "answer") -> Screen:
    """Drops rows whose answer is of no kind in `kinds`."""
    if unknown := set(kinds) - ANSWERS.keys():
        raise ValueError(f"kinds: {min(unknown)!r} is none of {', '.join(ANSWERS)}")

    def screen(row: Row) -> str:
        kind = answer_kind(column_of(row, column))
        return "" if kind in kinds else kind

    return screen


def pattern(*, drop: str = "", keep: str = "", column: str = "prompt") -> Screen:
    """Drops rows in which the regular expression `drop` is found (proofs, figures), or `keep` is not."""
    unwanted, wanted = (re.compile(each, re.IGNORECASE) if each else None for each in (drop, keep))

    def screen(row: Row) -> str:
        text = column_of(row, column)
        if unwanted and (found := unwanted.search(text)):
            return f"has {found[0]!r}"
        return f"has no {keep!r}" if wanted and not wanted.search(text) else ""

    return screen


def overlap(*, against: list[str], n: int = 9, column: str = "prompt", their_column: str = "prompt") -> Screen:
    """Drops rows that share `n` words in a row with a row of the JSONL files `against`: test sets."""
    known: dict[int, str] = {}
    for path in against:
        for number, theirs in enumerate(read_rows([Path(path).expanduser()]), 1):
            known |= dict.fromkeys(ngrams(column_of(theirs, their_column), n), f"{path}:{number}")

    def screen(row: Row) -> str:
        found = next((known[run] for run in ngrams(column_of(row, column), n) if run in known), "")
        return f"shares {n} words with {found}" if found else ""

    return screen


def leak(*, reference: str = "reference", n: int = 8, column: str = "prompt") -> Screen:
    """Drops rows whose prompt has `n` words in a row of their own reference."""

    def screen(row: Row) -> str:
        shared = ngrams(column_of(row, column), n) & ngrams(column_of(row, reference), n)
        return f"has {n} words of {reference}" if shared else ""

    return screen


def language(*, allowed: list[str], column: str = "prompt") -> Screen:
    """Drops rows in another language than those `allowed` (ISO 639-1)."""
    import py3langid

    def screen(row: Row) -> str:
        found = py3langid.classify(column_of(row, column))[0]
        return "" if found in allowed else str(found)

    return screen


SCREENS: dict[str, Callable[..., Screen]] = {
    "length": length,
    "answer": answer,
    "pattern": pattern,
    "overlap": overlap,
    "leak": leak,
    "language": language,
}


def column_of(row: Row, column: str) -> str:
    if column not in row:
        raise ValueError(f"no column {column!r}; there are {', '.join(row)}")
    return text_of(row[column]) if isinstance(row[column], list) else str(row[column])


class Screened:
    """A reward that gives 1 to rows which all screens keep, so that they run in a pool; `filters` are tables with the
    name of a screen, or an import path of one's own maker of screens, and its options."""

    def __init__(self, *, filters: list[dict[str, Any]]):
        self._screens = [(table.get("name", ""), make(**table)) for table in filters]

    def __call__(self, prompt: str, completion: str, answer: str, **fields: Any) -> Verdict:
        row = {"prompt": prompt, "answer": answer, **fields}
        for name, screen in self._screens:
            if why := screen(row):
                return Verdict(0.0, False, evidence={"filter": name, "why": why})
        return Verdict(1.0, True)


def make(*, name: str = "", **options: Any) -> Screen:
    """Raises `ValueError` for a screen that does not exist, or options that it refuses."""
    if name not in SCREENS and ":" not in name:
        names = [*SCREENS, "duplicates", "tests", "pass_rate"]
        allowed = f"allowed are {', '.join(names)} or a path package.module:name"
        raise ValueError(f"unknown filter {name!r}{suggestion(name, names)}: {allowed}")
    maker = SCREENS[name] if name in SCREENS else load(name)
    try:
        return maker(**fitted(maker, options, whole=True))
    except (TypeError, ValueError, OSError, re.error) as error:
        raise ValueError(f"filter {name}: {error}") from error

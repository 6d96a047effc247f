"""Mathematical equality by math-verify: 1/2 is 0.5 is 50% is \\boxed{\\frac{1}{2}}."""

import logging
import re
from functools import lru_cache
from itertools import accumulate
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Rational

from rewards.answer import after_thinking, announced, boxed, tagged
from rewards.choice import chosen, is_choice
from rewards.notation import base, bracket, far, relation, rewritten, words
from rewards.units import Quantity, quantity
from rewards.verdict import Verdict, brief

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off

LONGEST, DEEPEST = 1000, 20  # characters and nested brackets of an answer; parsing more takes time beyond any use
SPOKEN = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+|(?:arc)?(?:sin|cos|tan)h?|log|exp|sqrt|frac")
WORD = re.compile(r"[A-Za-z]{3}")  # what is left of prose
GRAMMARS = (LatexExtractionConfig(), ExprExtractionConfig())


def equals(
    prompt: str, completion: str, answer: str, *, boxed_only: bool = False, choices: bool = True, **fields: Any
) -> Verdict:
    """1 where the answer in `completion` equals `answer`; else 0.

    It is looked for after the last thinking block, between <answer> and </answer> where they stand: the last \\boxed{}
    (several boxes in a row are one set), or else the last line that announces an answer, or else the last value;
    `boxed_only` wants a box. With `choices` an `answer` that is a single letter, A to J, is the letter of a multiple
    choice. Quantities in different units are converted; a unit that is left out is forgiven.

    math-verify's own time limits are off: one clock rules, the pool's. Raises `ValueError` for an `answer` that cannot
    be read.
    """
    text = after_thinking(prompt, completion)
    text = text if text is None else tagged(text) or text
    given = find(text, boxed_only) if text is not None else None
    evidence = {"parsed": brief(given if given is not None else ""), "expected": brief(answer)}
    if choices and is_choice(answer):
        solved = given is not None and chosen(given) == answer.strip(" ()")
    else:
        gold = read_gold(answer)
        solved = given is not None and sane(given) and same(gold, rewritten(given))
    return Verdict(float(solved), solved, evidence=evidence)


def find(text: str, boxed_only: bool = False) -> str | None:
    """The answer in `text`, as it stands there; None where there is none."""
    boxes = boxed(text)
    if len(boxes) > 1:
        return rf"\{{{', '.join(boxes)}\}}"
    if boxes or boxed_only:
        return boxes[0] if boxes else None
    lines = [line for line in text.splitlines() if line.strip()]
    return announced(text) or (lines[-1][-LONGEST:] if lines else None)


def sane(text: str) -> bool:
    """Whether `text` is short, its braces match and its brackets are not nested beyond any use."""
    steps = [1 if each in "({[" else -1 for each in text if each in "({[]})"]
    braces = list(accumulate((1 if each == "{" else -1 for each in text if each in "{}"), initial=0))
    short = len(text) <= LONGEST and max(accumulate(steps, initial=0)) <= DEEPEST
    return short and min(braces) == braces[-1] == 0


def same(gold: str, given: str) -> bool:
    """Whether two answers, of which `gold` can be read, are equal."""
    (expected_relation, gold), (given_relation, given) = relation(gold), relation(given)
    if expected_relation != given_relation or {bracket(gold), bracket(given)} == {"set", "tuple"} or far(gold, given):
        return False
    if base(gold) and base(given) and base(gold) != base(given):
        return False
    (expected_words, is_text), (given_words, given_is_text) = words(gold), words(given)
    if expected_words and given_words and (expected_words == given_words or is_text or given_is_text):
        return expected_words == given_words
    ours, theirs = quantity(given), quantity(gold)
    if ours and theirs:
        if ours.dimension != theirs.dimension:
            return False
        return equal(_scaled(theirs), _scaled(ours))
    return equal(read_latex(gold), read_latex(ours.value if ours else given))


def equal(gold: list[Any], given: list[Any]) -> bool:
    return bool(verify(gold, given, allow_set_relation_comp=True, timeout_seconds=0))


def _scaled(each: Quantity) -> list[Any]:
    """The values in base units."""
    scale = Rational(each.scale.numerator, each.scale.denominator)
    return [value * scale for value in read_latex(each.value) if not isinstance(value, str)]


@lru_cache(maxsize=256)
def read_gold(answer: str) -> str:
    """The text of the answer in `answer`; the completions of a group share it."""
    boxes = boxed(answer)
    text = rewritten(boxes[0] if boxes else announced(answer) or answer)
    if read_latex(text):
        return text
    raise ValueError(f"the answer {answer!r} is no mathematics that math-verify can read")


@lru_cache(maxsize=64)
def read_latex(text: str) -> list[Any]:
    """What math-verify reads in `text`: as LaTeX where it is a formula, also without its dollars; or else the last
    number or expression."""
    marked = any(mark in text for mark in ("$", r"\(", r"\["))
    for form in (text, f"${text}$") if marked or WORD.search(SPOKEN.sub("", text)) else (rf"\boxed{{{text}}}", text):
        if parsed := parse(form, GRAMMARS, parsing_timeout=0):
            return parsed
    return []


read_latex(r"\frac{1}{2}")  # the first parse makes the parser's tables: here, before workers are forked

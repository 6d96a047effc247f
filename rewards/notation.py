"""Ways of writing an answer that math-verify reads as something else, or not at all."""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate

TEXT = r"\\(?:text|textrm|textbf|mathrm|mathbf|mbox)"
PLAIN = r"(?:\\[A-Za-z]++|\\[^A-Za-z]|(?![A-Za-z]{3})[^\\])+?"  # a formula: no word of three letters
WORDS = re.compile(rf"({TEXT}\s*\{{)?\s*([A-Za-z][A-Za-z' -]+?)\s*\}}?\.?")
RELATION = re.compile(r"\\[A-Za-z]+|[<>]=?")
NEGATION = re.compile(rf"(?:{TEXT}\s*\{{)?\s*(?:not|never)\b", re.IGNORECASE)
DECIMAL = re.compile(r"[+-]?\d{1,100}(?:\.\d{1,100})?")
BASE = re.compile(r"\d_\{?(\d{1,2})\}?[\s$]*\Z")
# What a relation that stands before a value is called.
RELATIONS = {
    **dict.fromkeys(("<", r"\lt"), "<"),
    **dict.fromkeys((">", r"\gt"), ">"),
    **dict.fromkeys(("<=", r"\le", r"\leq", r"\leqslant"), "<="),
    **dict.fromkeys((">=", r"\ge", r"\geq", r"\geqslant"), ">="),
    **dict.fromkeys((r"\ne", r"\neq"), "!="),
}


def repeating(found: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction: (16 - 1) / 90."""
    whole, fixed, period = found[1] or "0", found[2], found[3]
    numerator = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"


SIGNS = str.maketrans({
    **{"∞": r"\infty ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "π": r"\pi ", "°": r"^\circ "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "·": r"\cdot ", "−": "-", "²": "^2", "³": "^3"},
    **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
})  # fmt: skip
REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"(?<=\d)(?:\\[,;: ]|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))"), ""),  # 1\,234
    (re.compile(r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar)\s*\{(\d{1,20})\}"), repeating),
    (re.compile(r"\A\s*([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})\s*\Z"), r"\1\\cdot10^{\2}"),  # 1e3
    (re.compile(r"\A\s*([+-]?\d+)\s+(\d+)/(\d+)\s*\Z"), r"\1\\frac{\2}{\3}"),  # 1 1/2
    (re.compile(rf"\s*{TEXT}\s*\{{\s*(?:and|or)\s*\}}|\s(?:and|or)\s"), ", "),
    (re.compile(rf"\A\s*{TEXT}\s*\{{[^{{}}]*(?:\bis|\bare|\bequals|:)\s*\}}(?=.)"), ""),  # \text{The answer is }5
    (re.compile(rf"\A({PLAIN}),?\s*+(?:{TEXT}\s*+\{{\s*+)?\b(?:where|when|since|because)\b.*\Z", re.DOTALL), r"\1"),
    (re.compile(r"√\s*(\d+|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![;.\s])(?:\\\\|[;.\s])++\Z"), ""),
]


def rewritten(text: str) -> str:
    """`text` as math-verify reads it."""
    text = text.translate(SIGNS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text


def relation(text: str) -> tuple[str, str]:
    """The relation that `text` begins with, as in "> 5" or "not 5", of which math-verify reads the value alone; and the
    rest."""
    bare = text.strip(" \t\n$")
    found = RELATION.match(bare)
    name = "!=" if NEGATION.match(bare) else RELATIONS.get(found[0], "") if found else ""
    return (name, bare[found.end() :] if found else bare) if name else ("", text)


def bracket(text: str) -> str:
    """"set" for {1, 2} and "tuple" for (1, 2), which math-verify takes for each other where there are two values."""
    text = re.sub(r"\\left|\\right|[\s$]", "", text)
    depths = list(accumulate({"(": 1, ")": -1}.get(each, 0) for each in text))
    whole = text.startswith("(") and depths.index(0) == len(text) - 1 if 0 in depths else False
    return "set" if text.startswith(r"\{") else "tuple" if whole else ""


def base(text: str) -> str:
    """The base of a number like 101_2, which math-verify leaves out; empty where it is ten or not said."""
    found = BASE.search(text)
    return found[1] if found else ""


def words(text: str) -> tuple[str, bool]:
    """`text` where it consists of words, without the difference between capital and small letters, else nothing; and
    whether it says that they are words and no product of variables."""
    found = WORDS.fullmatch(text.strip(" \t\n$"))
    return (found[2].casefold(), found[1] is not None) if found else ("", False)


def far(first: str, second: str) -> bool:
    """Whether both are decimal numbers, and not the same one to six digits; math-verify looks at six decimals."""
    if not (DECIMAL.fullmatch(first) and DECIMAL.fullmatch(second)):
        return False
    one, other = Fraction(first), Fraction(second)
    return abs(one - other) > max(abs(one), abs(other)) / 10**6

"""Units of measurement at the end of an answer."""

import re
from fractions import Fraction
from typing import Any

from sympy import Rational

# Base unit -> every name of its multiples, with how many of the base unit each is.
MULTIPLES = {
    "m": {
        "nm": "1e-9",
        "mm millimeter millimetre": "1e-3",
        "cm centimeter centimetre": "1e-2",
        "dm": "1e-1",
        "m meter metre": "1",
        "km kilometer kilometre": "1000",
        "in inch inches": "0.0254",
        "ft foot feet": "0.3048",
        "yd yard": "0.9144",
        "mi mile": "1609.344",
    },
    "g": {"mg": "1e-3", "g gram": "1", "kg kilogram": "1000", "lb pound": "453.59237", "oz ounce": "28.349523125"},
    "s": {"ms": "1e-3", "s sec second": "1", "min minute": "60", "h hr hour": "3600", "d day": "86400"},
    "l": {"ml mL milliliter millilitre": "1e-3", "cl": "1e-2", "dl": "1e-1", "l L liter litre": "1"},
    "dollar": {"cent": "0.01", "dollar": "1"},
}
SCALES = {
    name: (Fraction(scale), base)
    for base, multiples in MULTIPLES.items()
    for names, scale in multiples.items()
    for name in names.split()
}
UNIT = re.compile(
    r"(?:\\(?:text|mathrm|operatorname|mbox|textrm)\s*\{[\s~]*([A-Za-z]+)\.?\s*\}"
    r"|(?<=[\d}\s~])[\s~]*(?<![A-Za-z\\])([A-Za-z]+)\.?)"
    r"(?:\s*\^\s*\{?([23])\}?)?[\s$.]*$"
)


def common_unit(first: str, second: str) -> tuple[Any, ...] | None:
    """How many of their base unit the units at the ends of two answers are; None where one has no known unit, and an
    empty tuple where no conversion exists (metres and seconds)."""
    units = [unit for text in (first, second) if (unit := _unit(text)) is not None]
    if len(units) < 2:
        return None
    (one, base), (other, other_base) = (_base(*unit) for unit in units)
    return (one, other) if base == other_base else ()


def _unit(text: str) -> tuple[str, int] | None:
    found = UNIT.search(text.strip())
    if found is None:
        return None
    word = found[1] or found[2]
    known = next((name for name in (word, word.lower(), word.lower().removesuffix("s")) if name in SCALES), None)
    return (known, int(found[3] or 1)) if known else None


def _base(name: str, power: int) -> tuple[Any, tuple[str, int]]:
    scale, base = SCALES[name]
    scale **= power
    return Rational(scale.numerator, scale.denominator), (base, power)

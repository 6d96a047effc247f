"""Units of measurement at the end of an answer."""

import re
from fractions import Fraction
from typing import Any

from sympy import Rational

# Symbol or name -> (how many of the base unit, base unit).
SCALES: dict[str, tuple[Fraction, str]] = {
    name: (Fraction(scale), base)
    for base, units in {
        "m": {"nm": "1e-9", "mm": "1e-3", "cm": "1e-2", "dm": "1e-1", "m": "1", "km": "1000", "in": "0.0254", "ft": "0.3048", "yd": "0.9144", "mi": "1609.344"},
        "g": {"mg": "1e-3", "g": "1", "kg": "1000", "lb": "453.59237", "oz": "28.349523125"},
        "s": {"ms": "1e-3", "s": "1", "min": "60", "h": "3600", "d": "86400"},
        "l": {"ml": "1e-3", "cl": "1e-2", "dl": "1e-1", "l": "1"},
        "USD": {"¢": "0.01", "USD": "1"},
    }.items()
    for name, scale in units.items()
}
NAMES = {
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm", "centimetre": "cm",
    "millimeter": "mm", "millimetre": "mm", "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "day": "d", "liter": "l", "litre": "l", "milliliter": "ml", "millilitre": "ml", "L": "l", "mL": "ml",
    "dollar": "USD", "cent": "¢",
}  # fmt: skip
UNIT = re.compile(
    r"(?:\\(?:text|mathrm|operatorname|mbox|textrm)\s*\{[\s~]*([A-Za-z¢]+)\.?\s*\}|(?<=[\d}\s~])[\s~]*(?<![A-Za-z\\])([A-Za-z¢]+)\.?)"
    r"(?:\s*\^\s*\{?([23])\}?)?[\s$.]*$"
)


def common_unit(first: str, second: str) -> tuple[Any, ...] | None:
    """How many of their base unit the units at the ends of two answers are; None where they are the same unit or one has
    none that is known, and an empty tuple where no conversion exists (metres and seconds)."""
    units = [_unit(text) for text in (first, second)]
    if units[0] is None or units[1] is None or units[0] == units[1]:
        return None
    (one, base), (other, other_base) = (_base(*unit) for unit in units if unit)
    return (one, other) if base == other_base else ()


def _unit(text: str) -> tuple[str, int] | None:
    found = UNIT.search(text.strip())
    if found is None:
        return None
    word = found[1] or found[2]
    name = NAMES.get(word) or NAMES.get(word.lower().removesuffix("s")) or NAMES.get(word.lower()) or word
    return (name, int(found[3] or 1)) if name in SCALES else None


def _base(name: str, power: int) -> tuple[Any, tuple[str, int]]:
    scale, base = SCALES[name]
    scale **= power
    return Rational(scale.numerator, scale.denominator), (base, power)

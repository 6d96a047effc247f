"""Units of measurement at the end of an answer."""

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

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
COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h"}

NUMBER = re.compile(r"[\s$+-]*(?:\\(?:d?frac|sqrt|cdot|times|pi|\$)|[\s$\d.,/{}^])+")  # no part of a formula
MARKUP = re.compile(r"\\(?:text|mathrm|operatorname|mbox|textrm)\s*\{([^{}]*)\}|\\[,;: ]|~")
FACTOR = r"[A-Za-z]+\.?(?:\s*\^\s*\{?-?[1-9]\}?)?"
UNIT = re.compile(rf"(?<=[\d}})\s])\s*(?<![A-Za-z\\])({FACTOR}(?:\s*(?:/|\bper\b|\*|\\cdot)\s*{FACTOR})*)[\s$.]*\Z")
PART = re.compile(r"(/|\bper\b)?[\s*]*(?:\\cdot\s*)?(?!per\b)([A-Za-z]+)\.?(?:\s*\^\s*\{?(-?[1-9])\}?)?")


class Quantity(NamedTuple):
    """A value as it is written, and its unit: so many (`scale`) of a product of powers of base units."""

    value: str
    scale: Fraction
    dimension: dict[str, int]


def quantity(text: str) -> Quantity | None:
    """`text` taken apart; None where it is no number with a known unit behind it."""
    text = MARKUP.sub(lambda found: f" {found[1] or ''}", text)
    found = UNIT.search(text)
    unit = _unit(COMPOUND.get(found[1], found[1])) if found else None
    value = text[: found.start()] if found else ""
    return Quantity(value, *unit) if unit and NUMBER.fullmatch(value) else None


def _unit(text: str) -> tuple[Fraction, dict[str, int]] | None:
    """Scale and dimension of "km/h" or "kg m^2": None where a name is unknown."""
    scale, dimension = Fraction(1), Counter()
    for divides, name, power in PART.findall(text):
        known = next((each for each in (name, name.lower(), name.lower().removesuffix("s")) if each in SCALES), None)
        if known is None:
            return None
        exponent = int(power or 1) * (-1 if divides else 1)
        multiple, base = SCALES[known]
        scale *= multiple**exponent
        dimension[base] += exponent
    return scale, {base: exponent for base, exponent in dimension.items() if exponent}

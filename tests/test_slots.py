"""Slots: what a user may write, and the line that answers a mistake."""

import pytest

from engine.algorithms.slots import Count, FromOne, Positive, UpToOne, bind
from engine.config import ConfigError


def scale(x: float, *, by: Positive, offset: float = 0.0) -> float:
    return by * x + offset


def odd(x: float, *, share: UpToOne = 0.5, cap: FromOne | None = None, length: Count = 1, flag: bool = False) -> float:
    return x


TABLE = {"scale": scale, "odd": odd}


def test_bind_gives_the_function_its_arguments():
    assert bind("a.b", {"name": "scale", "by": 3, "offset": 0.5}, TABLE)(2.0) == 6.5


def test_the_slot_stays_as_it_was():
    slot = {"name": "scale", "by": 3}
    bind("a.b", slot, TABLE)
    assert slot == {"name": "scale", "by": 3}


@pytest.mark.parametrize(
    ("slot", "line"),
    [
        ({}, "a.b.name = None: must be one of scale, odd"),
        ({"name": "scael"}, "a.b.name = 'scael': must be one of scale, odd (did you mean scale?)"),
        ({"name": ["scale"]}, "a.b.name = ['scale']: must be one of scale, odd"),
        ({"name": "scale"}, "a.b.by: scale needs it"),
        ({"name": "scale", "by": 1, "of": 2}, "a.b.of = 2: scale takes by, offset"),
        ({"name": "scale", "by": 1, "x": 2}, "a.b.x = 2: scale takes by, offset"),
        ({"name": "scale", "by": "1"}, "a.b.by = '1': Expected 'float', got 'str'"),
        ({"name": "scale", "by": True}, "a.b.by = True: Expected 'float', got 'bool'"),
        ({"name": "scale", "by": 0}, "a.b.by = 0: Expected 'float' > 0.0"),
        ({"name": "scale", "by": float("nan")}, "a.b.by = nan: Expected a number"),
        ({"name": "odd", "share": 1.5}, "a.b.share = 1.5: Expected 'float' <= 1.0"),
        ({"name": "odd", "cap": 0.5}, "a.b.cap = 0.5: Expected 'float' >= 1.0"),
        ({"name": "odd", "length": 1.5}, "a.b.length = 1.5: Expected 'int', got 'float'"),
        ({"name": "odd", "flag": 1}, "a.b.flag = 1: Expected 'bool', got 'int'"),
    ],
)
def test_a_mistake_is_one_line_that_names_field_value_and_what_is_allowed(slot, line):
    with pytest.raises(ConfigError) as error:
        bind("a.b", slot, TABLE)
    assert str(error.value) == line

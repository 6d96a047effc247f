import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from rewards.sandbox import values
from rewards.sandbox.values import decode, encode


class Link:
    def __init__(self, value: int, after: Any = None):
        self.value, self.after = value, after


Link.__module__ = values.PROGRAM


@pytest.mark.parametrize(
    "value",
    [
        None, True, 7, -(2**200), 0.1, 1e300, "", "é\ud800\n", [], (), {}, set(), [1, [2, (3, "x")]], {1: {2: (3,)}},
        {(1, (2,)): frozenset([(3,)])}, {1, 2}, b"\x00\xff", 3 - 4j, math.inf, -math.inf, [()] * 3,
    ],
)  # fmt: skip
def test_values_come_back_with_their_types(value):
    back = decode(encode(value))
    assert back == value and repr(back) == repr(value)


KEYS = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text() | strategies.binary(),
    lambda keys: strategies.lists(keys, max_size=3).map(tuple) | strategies.frozensets(keys, max_size=3),
    max_leaves=8,
)
VALUES = strategies.recursive(
    KEYS | strategies.floats(allow_nan=False) | strategies.complex_numbers(allow_nan=False),
    lambda values: (
        strategies.lists(values, max_size=4)
        | strategies.lists(values, max_size=4).map(tuple)
        | strategies.sets(KEYS, max_size=4)
        | strategies.dictionaries(KEYS, values, max_size=4)
    ),
    max_leaves=20,
)


def types(value):
    """The value's types, all the way down; of sets, in the order of their items' own."""
    if isinstance(value, dict):
        return dict, [(types(key), types(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [types(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(types(item)) for item in value)
    return type(value)


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_any_value_comes_back(value):
    back = decode(encode(value))
    assert back == value and types(back) == types(value)


def test_what_is_no_number_comes_back():
    assert math.isnan(decode(encode([math.nan]))[0])


def test_subclasses_come_out_as_their_base():
    from collections import Counter, OrderedDict, deque, namedtuple

    for value, plain in (
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (namedtuple("P", "x")(1), (1,)),
    ):
        assert type(decode(encode(value))) is type(plain) and decode(encode(value)) == plain
    with pytest.raises(ValueError, match="deque is no data"):
        encode(deque())


def test_arrays_come_out_as_lists():
    import numpy as np

    assert decode(encode(np.arange(4).reshape(2, 2))) == [[0, 1], [2, 3]]
    assert decode(encode([np.float32(0.5), np.int64(3), {np.int8(1): np.True_}])) == [0.5, 3, {1: True}]


def test_depth_and_cycles_are_no_problem():
    chain = None
    for number in range(20_000):
        chain = Link(number, chain)
    back = decode(encode(chain), {"Link": Link})
    assert type(back) is Link and back.value == 19_999 and back.after.after.value == 19_997
    nested = []
    for _ in range(20_000):
        nested = [nested]
    assert len(decode(encode(nested))) == 1
    loop: list[Any] = [1]
    loop.append((loop, 2))
    back = decode(encode(loop))
    assert back[1][0] is back and back[1][1] == 2


@pytest.mark.parametrize(
    "value", [len, object, open, (i for i in ()), math, range(3), 10**5000], ids=lambda value: type(value).__name__
)
def test_what_is_no_data_is_refused(value):
    with pytest.raises(ValueError):
        encode([value])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "[1]",
        "{}",
        b"\xff",
        "[[0], 5]",
        "[[0], []]",
        '[[-1], [["list"]]]',
        '[["0"], [["list"]]]',
        '[[0, 0], [["list"]]]',
        '[[0], [["list", ["x"]]]]',
        '[[0], [["tuple", [0]]]]',
        '[[0], [["object", "Link"]]]',
        '[[0], [["object", "os.system"]]]',
        '[[0], [["dict", 1]]]',
        '[[0], [["set", [1]], ["list"]]]',
        '[[0], [["what"]]]',
        '[[0], [["float", "1"]]]',
        '[[0], [["bytes", "x"]]]',
        '[[0], [[["list"]]]]',
        "[[0], [[]]]",
        "[1" + "0" * 5000 + ", []]",
        "[" * 100_000,
    ],
    ids=range(23),
)
def test_what_no_encoder_wrote_is_refused(text):
    with pytest.raises(ValueError):
        decode(text)


def test_objects_are_of_classes_that_are_given():
    text = encode(Link(1))
    assert decode(text, {"Link": Link}).value == 1
    with pytest.raises(ValueError, match="KeyError"):
        decode(text, {"link": Link})

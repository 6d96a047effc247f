"""Function calls: read without running them, matched as BFCL does."""

import json
from typing import Any

import pytest

from rewards.calls import Call, read_calls
from rewards.table import resolve
from rewards.tools import equal, pair

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string"},
            "detail": {"type": "boolean"},
            "at": {"type": "array"},
            "where": {"type": "dict"},
            "limit": {"type": "float"},
        },
        "required": ["city"],
    },
}
CITY = {"get_weather": {"city": ["New York", "NYC"], "days": [3], "unit": ["celsius", ""]}}


def judge(completion: str, answer: Any, prompt: str = "", **options: Any):
    return resolve("tools", options)(prompt, completion, json.dumps(answer), functions=[WEATHER])


# ---- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f.g", "arguments": {"a": 1, "b": [true, null]}}',
        '[{"name": "f.g", "parameters": {"a": 1, "b": [true, null]}}]',
        '{"name": "f.g", "arguments": "{\\"a\\": 1, \\"b\\": [true, null]}"}',
        '{"type": "function", "function": {"name": "f.g", "arguments": {"a": 1, "b": [true, null]}}}',
        '<tool_call>\n{"name": "f.g", "arguments": {"a": 1, "b": [true, null]}}\n</tool_call>',
        '```json\n{"name": "f.g", "arguments": {"a": 1, "b": [true, null]}}\n```',
        "f.g(a=1, b=[True, None])",
        "[f.g(a=1, b=[true, null])]",
    ],
)
def test_every_syntax_reads_alike(text):
    assert read_calls(text) == [Call("f.g", {"a": 1, "b": [True, None]})]


def test_several_calls():
    three = [Call("f", {"a": -1}), Call("g", {}, ["x"]), Call("f", {"a": 2.5})]
    assert read_calls("[f(a=-1), g('x'), f(a=2.5)]") == three
    assert read_calls("f(a=-1)\ng('x')\nf(a=2.5)") == three
    two = '<tool_call>{"name": "f"}</tool_call> and <tool_call>{"name": "g"}</tool_call>'
    assert read_calls(two) == [Call("f", {}), Call("g", {})]


@pytest.mark.parametrize(
    "text",
    [
        "no call here",
        "f(a=__import__('os').system('touch /tmp/x'))",
        "f(**{'a': 1})",
        "f(a=[x for x in (1,)])",
        "f(a=1)(b=2)",
        "f(a=1, a=2)",
        '{"name": "f", "arguments": {"a": 1, "a": 2}}',
        '{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}',
        "x = f(a=1)",
        '{"arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        "[" * 5000,
        "f(" * 3000,
        "f(a=" + "-" * 15000 + "1)",
        "1" * 30_000,
        "\0",
        "",
    ],
)
def test_what_is_no_call_is_refused_and_never_run(text):
    try:
        assert read_calls(text) == []
    except ValueError:
        pass


def test_a_text_beyond_any_use_is_not_parsed():
    assert read_calls("f()" + " " * 19_997) == [Call("f", {})]
    with pytest.raises(ValueError, match="at most 20000"):
        read_calls("f()" + " " * 19_998)


# ---- one call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion",
    [
        'get_weather(city="New York", days=3)',
        "get_weather(city='new-york', days=3, unit='Celsius')",
        'get_weather("NYC", 3)',
        '<think>days=4?</think>{"name": "get_weather", "arguments": {"days": 3, "city": "nyc"}}',
    ],
)
def test_right_call(completion):
    assert judge(completion, [CITY]).solved


@pytest.mark.parametrize(
    ("completion", "problem"),
    [
        ("get_wether(city='NYC', days=3)", "get_wether is not get_weather"),
        ("get_weather(days=3)", "city is required"),
        ("get_weather(city='NYC')", "days is missing"),
        ("get_weather(city='NYC', days='3')", "days = '3' is no integer"),
        ("get_weather(city='NYC', days=3.0)", "days = 3.0 is no integer"),
        ("get_weather(city='NYC', days=True)", "days = True is no integer"),
        ("get_weather(city='NYC', days=4)", "days = 4 is none of [3]"),
        ("get_weather(city='Boston', days=3)", "city = 'Boston' is none of"),
        ("get_weather(city='NYC', days=3, unit='kelvin')", "unit = 'kelvin' is none of"),
        ("get_weather(city='NYC', days=3, colour='red')", "it has no argument colour"),
        ("get_weather(city='NYC', days=3, detail=True)", "unexpected detail"),
        ("get_weather('NYC', city='NYC', days=3)", "arguments beyond its own"),
        ("I would call get_weather", "neither JSON nor Python"),
        ("get_weather(city='NYC', days=3); get_weather(city='NYC', days=3)", "1 of 1 calls match"),
        ("<think>get_weather(city='NYC', days=3)", "no call"),
    ],
)
def test_wrong_call(completion, problem):
    verdict = judge(completion, [CITY])
    assert verdict.score == 0.0 and problem in verdict.evidence["problem"]


def test_types():
    def call(argument: str, value: Any, wanted: Any) -> bool:
        answer = [{"get_weather": {"city": ["x"], argument: [wanted]}}]
        return judge(f"get_weather(city='x', {argument}={value!r})", answer).solved

    assert call("limit", 5, 5.0) and call("limit", 5.0, 5) and not call("limit", 5.5, 5)
    assert call("at", [1, 2], [1, 2]) and call("at", (1, 2), [1, 2]) and not call("at", [2, 1], [1, 2])
    assert call("at", ["New York"], ["new york"]) and not call("at", ["New York"], ["York"])
    assert call("detail", True, True) and not call("detail", 1, True) and not call("detail", True, False)
    assert call("where", {"x": 1}, {"x": [1, 2], "y": [3, ""]}) and not call("where", {"x": 3}, {"x": [1, 2]})
    assert call("where", {"x": [1, 2]}, {"x": [1, 2]}) and not call("where", {"y": 1}, {"x": [1]})


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("New-York", "new york", True),
        ("1.5", "15", False),
        ("-5", "5", False),
        ("5.0", "5", True),
        (".", "/", False),
        ("-", "", False),
        ("", "", True),
    ],
)
def test_texts_are_equal_but_for_what_is_insignificant(given, wanted, right):
    assert equal(given, wanted) is right


def test_true_is_not_one_also_without_a_schema():
    reward = resolve("tools", {})
    answer = json.dumps([{"f": {"a": [1], "b": [True]}}])
    assert reward("", "f(a=1, b=True)", answer).solved and reward("", "f(a=1.0, b=True)", answer).solved
    assert not reward("", "f(a=True, b=True)", answer).solved and not reward("", "f(a=1, b=1)", answer).solved


def test_plain_calls_as_the_answer_and_dots_in_names():
    for arguments in ({"a": 1}, '{"a": 1}'):
        call = {"name": "math.sum", "arguments": arguments}
        assert all(judge("math_sum(a=1)", [each]).solved for each in (call, {"type": "function", "function": call}))
    assert judge("math_sum(a=1)", [{"name": "math.sum", "arguments": {"a": 1}}]).solved
    assert not judge("math_sum(a=1)", [{"name": "math.sum", "arguments": {"a": 1, "b": 2}}]).solved


# ---- several, and none -----------------------------------------------------------------------------------------

BOTH = [{"get_weather": {"city": ["Rome"]}}, {"get_weather": {"city": ["Oslo"]}}, {"stop": {}}]


def test_parallel_calls_in_any_order():
    right = "[stop(), get_weather(city='Oslo'), get_weather(city='Rome')]"
    assert judge(right, BOTH).solved
    twice = "[stop(), get_weather(city='Oslo'), get_weather(city='Oslo')]"
    assert judge(twice, BOTH).score == 0.0 and judge(twice, BOTH, partial=True).score == pytest.approx(2 / 3)
    assert judge(right[:-1] + ", stop()]", BOTH, partial=True).score == 0.75
    assert judge("[stop()]", BOTH, partial=True).score == pytest.approx(1 / 3)


def test_calls_are_paired_so_that_most_fit():
    assert pair([[True, True], [True, False]]) == 2
    assert pair([[True, False], [True, False]]) == 1
    assert pair([]) == 0


def test_where_no_call_is_wanted():
    assert judge("None of the functions helps.", []).solved
    assert not judge("get_weather(city='Rome')", []).solved
    assert judge("<think>get_weather(city='Rome')</think>I cannot.", []).solved
    assert not judge("<think>I cannot", []).solved and not judge(" ", []).solved


@pytest.mark.parametrize("torn", ["<tool_call>get_weather(city='Rome'</tool_call>", '<tool_call>{"name": "get_wea'])
def test_a_torn_call_is_a_call_where_none_is_wanted(torn):
    assert not judge(torn, []).solved


def test_functions_that_are_none_are_refused():
    for functions in ("{{", [3], [{"parameters": {}}]):
        with pytest.raises(ValueError, match="no list of schemas"):
            resolve("tools", {})("", "f()", "[]", functions=functions)


@pytest.mark.parametrize("answer", ["", "{", '[{"f": 3}]', '[{"f": {"a": 1}}]', "[3]"])
def test_an_answer_that_is_none_is_refused(answer):
    with pytest.raises(ValueError, match="no list of calls"):
        resolve("tools", {})("", "f()", answer)

"""Function calling, judged as the Berkeley Function Calling Leaderboard does: by name and arguments, nothing is run."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rewards.answer import after_thinking
from rewards.calls import OPENED, Call, read_calls
from rewards.verdict import Verdict, brief

OMITTED = ""  # among the allowed values of an argument: it may be left out
INSIGNIFICANT = re.compile(r"[\s,./\\\-_*^]")  # of a text

Allowed = dict[str, list[Any]]  # argument -> its allowed values
Wanted = tuple[str, Allowed]

# Type of JSON schema, or BFCL's name for it -> whether a value is one.
TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list | tuple),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}
TYPES |= {"float": TYPES["number"], "tuple": TYPES["array"], "dict": TYPES["object"], "String": TYPES["string"]}


def matches(
    prompt: str, completion: str, answer: str, *, partial: bool = False, functions: Any = (), **fields: Any
) -> Verdict:
    """1 where the calls in `completion` are those that `answer` wants, in any order; with `partial` the share of them.

    `answer` is JSON: a list of {function: {argument: [allowed values]}}, where "" among the values means that the
    argument may be left out, or of {"name": function, "arguments": {argument: value}}; an empty list wants an answer
    without a call, and a torn one within its tags is one. `functions`, the JSON schemas that the prompt offered (a
    list, or its JSON), adds checks of types, required and unknown arguments. Texts are compared without case, white
    space and ,./\\-_*^, but numbers in them by value. Raises `ValueError` for an `answer` or `functions` that cannot be
    read.
    """
    wanted = read_wanted(answer)
    schemas = read_schemas(functions if isinstance(functions, str) else json.dumps(list(functions)))
    text = after_thinking(prompt, completion)
    try:
        calls, problem = read_calls(text) if text is not None else [], ""
    except ValueError as error:
        calls, problem = [], str(error)
    evidence = {"parsed": brief("; ".join(map(str, calls))), "expected": brief(answer)}
    if not wanted:
        declined = text is not None and bool(text.strip()) and not calls and not OPENED.search(text)
        return Verdict(float(declined), declined, evidence=evidence)
    problems = [[mismatch(call, want, schemas) for want in wanted] for call in calls]
    num_matched = pair([[not each for each in row] for row in problems])
    share = num_matched / max(len(wanted), len(calls))
    if share < 1:
        nearest = min((each for row in problems for each in row if each), key=len, default="no call")
        evidence["problem"] = brief(problem or f"{num_matched} of {len(wanted)} calls match; {nearest}", 160)
    return Verdict(share if partial or share == 1 else 0.0, share == 1, evidence=evidence)


@lru_cache(maxsize=64)  # a group's completions share one answer
def read_wanted(answer: str) -> list[Wanted]:
    try:
        calls = json.loads(answer)
        wanted = [_wanted(call) for call in (calls if isinstance(calls, list) else [calls])]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the answer {brief(answer)!r} is no list of calls: {error}") from error
    return wanted


def _wanted(call: dict[str, Any]) -> Wanted:
    if isinstance(call.get("function"), dict):
        call = call["function"]
    if isinstance(call.get("name"), str):
        arguments = call.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return call["name"], {name: [value] for name, value in arguments.items()}
    ((function, allowed),) = call.items()
    if not all(isinstance(values, list) for values in allowed.values()):
        raise ValueError(f"the allowed values of {function} are no lists")
    return function, allowed


@lru_cache(maxsize=64)
def read_schemas(functions: str) -> dict[str, dict[str, Any]]:
    """By a function's name the schema of its arguments."""
    try:
        listed = json.loads(functions)
        schemas = [each.get("function", each) for each in (listed if isinstance(listed, list) else [listed])]
        return {each["name"]: each.get("parameters", {}) for each in schemas}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"functions = {brief(functions)!r}: no list of schemas: {error!r}") from error


def mismatch(call: Call, wanted: Wanted, schemas: dict[str, dict[str, Any]]) -> str:
    """Why `call` is not the `wanted` one; empty where it is."""
    function, allowed = wanted
    if call.name not in (function, function.replace(".", "_")):  # some models' syntax knows no dots
        return f"{call.name} is not {function}"
    schema = schemas.get(function, {})
    names = list(schema.get("properties", allowed))
    if len(call.positional) > len(names) or set(names[: len(call.positional)]) & call.arguments.keys():
        return f"{function}: arguments beyond its own"
    given = dict(zip(names, call.positional, strict=False)) | call.arguments
    if lacking := [name for name in schema.get("required", ()) if name not in given]:
        return f"{function}: {lacking[0]} is required"
    if problem := next(filter(None, (_type_problem(name, given, schema) for name in given)), ""):
        return f"{function}: {problem}"
    return _value_problem(given, allowed, f"{function}: ")


def _type_problem(name: str, given: dict[str, Any], schema: dict[str, Any]) -> str:
    if "properties" not in schema:
        return ""
    if name not in schema["properties"]:
        return f"it has no argument {name}"
    kind = schema["properties"][name].get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    fits = any(TYPES[each](given[name]) if each in TYPES else True for each in kinds)
    return "" if fits else f"{name} = {given[name]!r} is no {kind}"


def _value_problem(given: dict[str, Any], allowed: Allowed, where: str) -> str:
    if unknown := given.keys() - allowed.keys():
        return f"{where}unexpected {min(unknown)}"
    for name, values in allowed.items():
        if name not in given:
            if OMITTED not in values:
                return f"{where}{name} is missing"
        elif not any(equal(given[name], value) for value in values):
            return f"{where}{name} = {given[name]!r} is none of {values!r}"
    return ""


def equal(given: Any, value: Any) -> bool:
    """Whether an argument has an allowed value. Numbers equal numbers (2 is 2.0, but True is not 1); in an object each
    key has a list of allowed values of its own, or one value."""
    if isinstance(given, str) and isinstance(value, str):
        return same_text(given, value)
    if isinstance(given, list | tuple) and isinstance(value, list | tuple):
        return len(given) == len(value) and all(map(equal, given, value))
    if isinstance(given, dict) and isinstance(value, dict):
        exact = {key: [each] for key, each in value.items()}
        listed = {key: each if isinstance(each, list) else [each] for key, each in value.items()}
        return not _value_problem(given, exact, "") or not _value_problem(given, listed, "")
    return isinstance(given, bool) == isinstance(value, bool) and bool(given == value)


def same_text(given: str, value: str) -> bool:
    """Without what is insignificant, unless nothing else is there or both are numbers: -1.5 is not 15."""
    try:
        return float(given) == float(value)
    except ValueError:
        ours, theirs = standard(given), standard(value)
        return ours == theirs if ours and theirs else given.strip() == value.strip()


def standard(text: str) -> str:
    return INSIGNIFICANT.sub("", text).lower().replace("'", '"')


def pair(fits: list[list[bool]]) -> int:
    """The most pairs (i, j) with `fits[i][j]` in which no i and no j stands twice, by augmenting paths."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column in (column for column, fit in enumerate(fits[row]) if fit and column not in tried):
            tried.add(column)
            if column not in owner or place(owner[column], tried):
                owner[column] = row
                return True
        return False

    return sum(place(row, set()) for row in range(len(fits)))

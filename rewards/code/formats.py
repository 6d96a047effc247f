"""The tests of a problem, from the columns that the usual data sets have.

    APPS, TACO         `input_output`: JSON with `inputs`, `outputs` and, for functions, `fn_name`
    LiveCodeBench      `public_test_cases`, `private_test_cases` (JSON, or as the data set packs it), and for functions
                       `metadata` with `func_name`
    HumanEval,         `test`: source with `check(candidate)` or with assertions, `entry_point`: what they call, and
    LeetCodeDataset    `prelude`: source that stands before program and test

Without such a column, `answer` holds what `input_output` would.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec


class Case(msgspec.Struct, frozen=True):
    """One test: text for standard input and from standard output, or a function's arguments and its value (or one of
    the `alternatives`)."""

    given: Any
    expected: Any
    alternatives: list[Any] = []


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Either `cases`, of a function where `entry` names one; or a `check` that calls the function itself."""

    cases: list[Case] = []
    entry: str = ""
    check: str = ""
    prelude: str = ""


Reader = Callable[[dict[str, Any]], Problem]


def problem(answer: str, fields: dict[str, Any]) -> Problem:
    """Raises `ValueError` for tests that cannot be read, or none."""
    present = [column for column in FORMATS if fields.get(column)] or ["answer"]
    column = "test" if "test" in present and fields.get("entry_point") else present[0]  # LeetCodeDataset has both
    read, *columns = FORMATS.get(column, (_taco, "input_output"))
    given = {"input_output": answer} if column == "answer" else {each: fields.get(each) for each in columns}
    try:
        found = _cached(read, *given.items()) if all(map(_is_text, given.values())) else read(given)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{column}: these are no tests: {type(error).__name__}: {error}") from error
    if not found.cases and not found.check:
        raise ValueError(f"{column}: there are no tests")
    return found


def _taco(fields: dict[str, Any]) -> Problem:
    tests = _json(fields["input_output"])
    entry = tests.get("fn_name") or ""
    pairs = zip(tests["inputs"], tests["outputs"], strict=True)
    if entry:
        return Problem(cases=[Case(_list(given), value, _unwrapped(value)) for given, value in pairs], entry=entry)
    return Problem(cases=[Case(_lines(given), _lines(expected)) for given, expected in pairs])


def _livecodebench(fields: dict[str, Any]) -> Problem:
    tests = [*_json(fields["public_test_cases"]), *_packed(fields.get("private_test_cases") or "[]")]
    entry = (_json(fields.get("metadata")) or {}).get("func_name") or ""
    if not entry:
        return Problem(cases=[Case(test["input"], test["output"]) for test in tests])
    cases = []
    for test in tests:
        arguments = [json.loads(line) for line in test["input"].splitlines() if line.strip()]
        cases.append(Case(arguments, json.loads(test["output"])))
    return Problem(cases=cases, entry=entry)


def _check(fields: dict[str, Any]) -> Problem:
    return Problem(check=fields["test"], entry=_name(fields["entry_point"]), prelude=fields["prelude"] or "")


@lru_cache(maxsize=4)  # a group's completions share their tests, which may be megabytes
def _cached(read: Reader, *items: tuple[str, str | None]) -> Problem:
    return read(dict(items))


# The column that tells a format, its reader, and the columns that it reads.
FORMATS: dict[str, tuple[Any, ...]] = {
    "input_output": (_taco, "input_output"),
    "public_test_cases": (_livecodebench, "public_test_cases", "private_test_cases", "metadata"),
    "test": (_check, "test", "entry_point", "prelude"),
}


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"entry_point = {value!r}: must be text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list of arguments")
    return value


def _unwrapped(value: Any) -> list[Any]:
    """APPS and TACO put some values into a list of their own, and do not say which."""
    return value if isinstance(value, list) and len(value) == 1 else []


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _packed(value: Any) -> Any:
    """JSON, or JSON pickled, compressed and in base 64, which is how LiveCodeBench hides its tests."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = _Text(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
    return _json(value)


class _Text(pickle.Unpickler):
    """Reads plain data alone: nothing in a pickle can be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"a pickle that names {module}.{name}")

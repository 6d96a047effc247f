"""The columns that rewards want of the rows that they judge, beside the prompt."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from rewards.code.formats import FORMATS
from rewards.table import TABLE, load
from rewards.terms import parts

Either = tuple[str, ...]  # columns of which a row needs one
Wanted = dict[Either, str]  # and the reward that wants it

# Of the rewards in `TABLE`; a sum wants what its terms do.
COLUMNS: dict[str, tuple[Either, ...]] = {
    "agreement": (("answer",),),
    "code": ((*FORMATS, "answer"),),
    "exact": (("answer",),),
    "format": (),
    "instructions": (("instruction_id_list", "answer"),),
    "judge": (("reference", "answer"),),
    "math": (("answer",),),
    "reasoning_gym": (("task",), ("options",), ("index",)),
    "tools": (("answer",),),
}


def wanted(reward: str, options: dict[str, Any]) -> Wanted:
    """What a row needs for `reward` with `options`, both of which `rewards.table.resolve` accepts."""
    return {
        either: name
        for name, its_options in parts(reward, options)
        for either in (COLUMNS[name] if name in TABLE else _of_signature(name))
        if not its_options.keys() & set(either)
    }


def _of_signature(path: str) -> Iterable[Either]:
    """What a user's reward takes without a default: its third argument, the answer, and keyword-only ones."""
    found = load(path)
    method = inspect.isclass(found)
    parameters = list(inspect.signature(found.__call__ if method else found).parameters.values())
    by_place = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    answer = by_place[2 + method : 3 + method]
    if not answer or answer[0].default is inspect.Parameter.empty:
        yield ("answer",)
    yield from ((each.name,) for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty)


def lacking(row: Mapping[str, Any], columns: Wanted) -> str:
    """What `row` lacks of `columns`, in words; empty where it lacks nothing."""
    for either, reward in columns.items():
        if problem := absent(row, *either):
            return f"{problem}, which reward {reward!r} wants"
    return ""


def absent(row: Mapping[str, Any], *either: str) -> str:
    """That none of these columns has a value in `row`, in words; empty where one has."""
    if any(row.get(column) is not None for column in either):
        return ""
    known = any(column in row for column in either)
    return f"no {'value in ' if known else ''}column {' or '.join(map(repr, either))}"

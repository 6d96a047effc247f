"""Values of a TOML table held against types, and options against the signature of what takes them."""

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from rewards.spelling import suggestion

# What an option may be; bounds of 1e9 keep infinity out, and what is no number.
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0, le=1e9)]
Unsigned = Annotated[float, Meta(ge=0, le=1e9)]
Finite = Annotated[float, Meta(ge=-1e9, le=1e9)]


class Misfit(ValueError):
    """A value is not what is allowed at its place. One line that begins with the place: "terms.0.weight = 'x': ..."."""


def fitted(
    taker: Callable[..., Any], options: dict[str, Any], *, place: str = "", whole: bool = False
) -> dict[str, Any]:
    """`options` as the keyword-only parameters of `taker` are annotated; with `whole` all without a default are needed.

    Raises `Misfit` for an option that does not exist, is missing or has another type.
    """
    parameters = inspect.signature(taker).parameters.values()
    named = {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}
    place = f"{place}." if place else ""
    for name, value in options.items():
        if name not in named:
            allowed = ", ".join(named) or "none"
            raise Misfit(f"{place}{name} = {value!r}: no such option{suggestion(name, named)}; allowed are {allowed}")
    lacking = [name for name, each in named.items() if whole and each.default is each.empty and name not in options]
    if lacking:
        raise Misfit(f"{place}{lacking[0]}: is required")
    hints = _hints(taker)
    return {name: convert(value, hints.get(name, Any), f"{place}{name}") for name, value in options.items()}


def _hints(taker: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what `taker` takes; none where they cannot be read."""
    owner = taker.__init__ if inspect.isclass(taker) and not issubclass(taker, msgspec.Struct) else taker  # type: ignore[misc]
    try:
        return get_type_hints(owner, include_extras=True)
    except (NameError, TypeError):  # of a user's function: for a type checker alone, or of a partial
        return {}


def convert(value: Any, kind: Any, place: str = "") -> Any:
    """`value`, which stands at `place`, as a `kind`. Raises `Misfit`, in the words of TOML and with what is allowed."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Misfit(_explain(str(error), kind, value, place)) from error


def _explain(message: str, kind: Any, value: Any, place: str) -> str:
    """msgspec's "... - at `$.run.steps`" as "run.steps = 'x': ..."."""
    text, _, where = message.partition(" - at `$")
    keys = re.findall(r"[^.`\[\]]+", where)
    lacking = re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", text)
    field = ".".join(filter(None, [place, *keys, lacking[2] if lacking else ""]))
    kind, value = _find(kind, value, keys)
    if lacking and lacking[1] == "missing required":
        return f"{field}: is required"
    if lacking:
        allowed, name = kind.__struct_fields__, lacking[2]
        return f"{field} = {value[name]!r}: unknown{suggestion(name, allowed)}; allowed are {', '.join(allowed)}"
    if get_origin(kind) is Literal:
        return f"{field} = {value!r}: allowed are {', '.join(map(str, get_args(kind)))}"
    for theirs, ours in {"`object`": "a table", "`array`": "a list", "`": "'"}.items():
        text = text.replace(theirs, ours)
    return f"{field} = {value!r}: {text}"


def _find(kind: Any, value: Any, keys: list[str]) -> tuple[Any, Any]:
    """The type and the value at `keys` below `kind` and `value`."""
    for key in keys:
        inside = isinstance(value, list)
        kind = get_args(kind)[0] if inside else get_type_hints(kind, include_extras=True)[key]
        value = value[int(key)] if inside else value[key]
    return kind, value

"""A slot of the configuration bound to its function: names, keys and ranges are checked when the config loads.

A slot is `{name = "...", ...}`: `name` picks a function of a table, the other keys are its keyword-only arguments. Each
argument's annotation says what it may be.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, get_type_hints

import msgspec

from engine.config import ConfigError, Slot
from rewards.spelling import suggestion

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
UpToOne = Annotated[float, msgspec.Meta(ge=0, le=1)]
FromOne = Annotated[float, msgspec.Meta(ge=1)]
Share = UpToOne
Count = Annotated[int, msgspec.Meta(ge=1)]


def bind(field: str, slot: Slot, table: Mapping[str, Callable]) -> partial:
    """The function that `slot` names, with its keyword arguments. Raises `ConfigError` naming `field` and the key."""
    name = slot.get("name")
    if not isinstance(name, str) or name not in table:
        near = suggestion(name, table) if isinstance(name, str) else ""
        raise ConfigError(f"{field}.name = {name!r}: must be one of {', '.join(table)}{near}")
    function = table[name]
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for key, parameter in keywords.items():
        if parameter.default is inspect.Parameter.empty and key not in slot:
            raise ConfigError(f"{field}.{key}: {name} needs it")
    arguments = {}
    for key, value in slot.items():
        if key == "name":
            continue
        if key not in keywords:
            near = suggestion(key, keywords)
            raise ConfigError(f"{field}.{key} = {value!r}: {name} takes {', '.join(keywords) or 'no arguments'}{near}")
        arguments[key] = convert(f"{field}.{key}", value, hints[key])
    return partial(function, **arguments)


def convert(field: str, value: Any, hint: Any) -> Any:
    """`value` as what `hint` allows. Raises `ConfigError`."""
    try:
        if value != value:
            raise msgspec.ValidationError("Expected a number")
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{field} = {value!r}: {error}".replace("`", "'")) from error

"""The built-in rewards by name, any other by import path.

A reward lives where its path says, so that its module (and what that imports) loads only where it is used.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from rewards.verdict import Verdict

Reward = Callable[..., float | bool | Verdict]

TABLE = {
    "exact": "rewards.exact:exact",
    "format": "rewards.format:matches",
    "math": "rewards.math:equals",
    "reasoning_gym": "rewards.logic:task_score",
}


def resolve(name: str, options: dict[str, Any]) -> Reward:
    """The reward `name` with `options` bound, to be called as (prompt, completion, answer, **fields).

    Raises `ValueError` for an unknown name, and for an option that is no keyword-only parameter of the reward.
    """
    if name not in TABLE and ":" not in name:
        raise ValueError(f"unknown reward {name!r}: allowed are {', '.join(TABLE)} or a path package.module:name")
    function = load(TABLE.get(name, name))
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"reward {name} must take all fields: (prompt, completion, answer, **fields)")
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise ValueError(f"reward {name} has no option {option!r}: allowed are {', '.join(allowed) or 'none'}")

    def reward(prompt: str, completion: str, answer: str, **fields: Any) -> float | bool | Verdict:
        return function(prompt, completion, answer, **{**fields, **options})

    return reward


def load(path: str) -> Callable[..., Any]:
    """What `path`, "package.module:name", names. Raises `ValueError` where it does not exist or cannot be called."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {path!r} (package.module:name): {error}") from error
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, not a callable")
    return found

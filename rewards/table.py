"""The built-in rewards by name, any other by import path.

A reward lives where its path says, so that its module (and what that imports) loads only where it is used.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from rewards.options import Misfit, fitted
from rewards.spelling import suggestion
from rewards.verdict import Verdict

Reward = Callable[..., Any]  # -> float | bool | Verdict, or an awaitable of one

TABLE = {
    "agreement": "rewards.agreement:agrees",
    "code": "rewards.code.reward:Code",
    "exact": "rewards.exact:exact",
    "format": "rewards.format:form",
    "instructions": "rewards.instructions:follows",
    "judge": "rewards.judge:Judge",
    "math": "rewards.math:equals",
    "reasoning_gym": "rewards.logic:task_score",
    "sum": "rewards.terms:weighted_sum",
    "tools": "rewards.tools:matches",
}


def resolve(name: str, options: dict[str, Any]) -> Reward:
    """The reward `name` with `options` bound, to be called as (prompt, completion, answer, **fields).

    What takes keyword-only parameters alone, a class for instance, makes a reward: it is called here, once, with the
    options. Raises `Misfit` for an option that is no keyword-only parameter, lacks or is not what its annotation says,
    and `ValueError` for an unknown name.
    """
    if name not in TABLE and ":" not in name:
        allowed = f"allowed are {', '.join(TABLE)} or a path package.module:name"
        raise ValueError(f"unknown reward {name!r}{suggestion(name, TABLE)}: {allowed}")
    function = load(TABLE.get(name, name))
    makes = makes_reward(function)
    if not makes:
        _check_takes_fields(function)
    options = fitted(function, options, whole=makes)
    return _make(function, options) if makes else _bind(function, options)


def makes_reward(function: Callable[..., Any]) -> bool:
    """Whether it takes options alone and gives a reward, rather than being one."""
    parameters = inspect.signature(function).parameters.values()
    return all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)


def waits(reward: Reward) -> bool:
    """Whether `reward` is asynchronous: it waits, for the network say, and needs no processor of its own meanwhile."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def _make(maker: Callable[..., Any], options: dict[str, Any]) -> Reward:
    """Calls the maker; what it refuses and names first, "option = value: ...", is the option's `Misfit`."""
    try:
        reward = maker(**options)
    except ValueError as error:
        names = "|".join(inspect.signature(maker).parameters)
        raise (Misfit if re.match(rf"({names})\b", str(error)) else ValueError)(str(error)) from error
    except Exception as error:  # other people's code
        raise ValueError(f"{type(error).__name__}: {error}") from error
    _check_takes_fields(reward)
    return reward


def _bind(function: Callable[..., Any], options: dict[str, Any]) -> Reward:
    """An option wins over a field of the same name."""

    def reward(prompt: str, completion: str, answer: str, **fields: Any) -> float | bool | Verdict:
        return function(prompt, completion, answer, **{**fields, **options})

    async def waiting(prompt: str, completion: str, answer: str, **fields: Any) -> float | bool | Verdict:
        return await function(prompt, completion, answer, **{**fields, **options})

    return waiting if inspect.iscoroutinefunction(function) else reward


def _check_takes_fields(reward: Callable[..., Any]) -> None:
    signature = inspect.signature(reward)
    try:
        signature.bind_partial("prompt", "completion", "answer")
    except TypeError as error:
        raise ValueError(f"must take (prompt, completion, answer, **fields): {error}") from error
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        raise ValueError("must take all fields: (prompt, completion, answer, **fields)")


def load(path: str) -> Callable[..., Any]:
    """What `path`, "package.module:name", names. Raises `ValueError` where it does not exist or cannot be called."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # other people's code
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import {path!r} (package.module:name): {why}") from error
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, not a callable")
    return found

"""The function under test as a check sees it, which runs in another sandbox. It imports the standard library alone."""

import builtins
from typing import Any

import values

CALLS, RESULTS = 4, 5  # descriptors of the check: what it asks, and what it is answered
LONGEST_REPLY = 1 << 26

Namespace = dict[str, Any]


def classes(namespace: Namespace) -> dict[str, type]:
    own = {name: each for name, each in namespace.items() if isinstance(each, type)}
    return {name: each for name, each in own.items() if each.__module__ == values.PROGRAM}


class Lost(BaseException):
    """The candidate has ended. No check can take it for an exception of the candidate's function."""


class Unspeakable(BaseException):
    """The check gives the candidate what is no data, a function for instance."""


class Candidate:
    """Its arguments become what the function made of them, but only where it returns nothing: else it could spoil what
    the check compares its value with."""

    def __init__(self, namespace: Namespace):
        self._namespace = namespace
        self._calls = open(CALLS, "w", closefd=False)
        self._results = open(RESULTS, "rb", closefd=False)
        self.num_calls = 0
        self.lost = False

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.num_calls += 1
        try:
            call = values.encode((arguments, keywords))
        except ValueError as error:
            raise Unspeakable(str(error)) from None
        try:
            return self._ask(call, arguments, keywords)
        except Raised as raised:
            raise exception(*raised.args) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.lost = True
            raise Lost(str(error)) from None

    def _ask(self, call: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self._calls.write(call + "\n")
        self._calls.flush()
        kind, *reply = values.decode(self._results.readline(LONGEST_REPLY), classes(self._namespace))
        if kind != "return":
            name, text = map(str, reply)
            raise Raised(name, text)
        value, left, left_keywords = reply
        if value is None:
            for old, new in zip(arguments, left, strict=True):
                overwrite(old, new)
            for name, old in keywords.items():
                overwrite(old, left_keywords[name])
        return value


class Raised(Exception):
    """The candidate's function raised: the name and the text of its exception."""


def overwrite(old: Any, new: Any) -> None:
    """`old`, an argument, becomes what the candidate made of it."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)
    elif type(old).__module__ == values.PROGRAM:
        vars(old).clear()
        vars(old).update(vars(new))


def exception(name: str, text: str) -> Exception:
    """The candidate's exception, if it is one of Python's. StopIteration would end a loop of the check as if all its
    cases had been seen."""
    found: Any = getattr(builtins, name, None)
    usual = isinstance(found, type) and issubclass(found, Exception)
    if not usual or issubclass(found, StopIteration | StopAsyncIteration | UnicodeError | ExceptionGroup):
        return RuntimeError(f"{name}: {text}")
    return found(text)

"""Python values as one line of JSON: data and nothing else, so that what an untrusted program returns can be read.

    [root, nodes]     nodes: [[kind, item, ...], ...]     an item is a plain scalar, or [i], which stands for node i

A tuple or frozen set stands behind what it holds, which makes depth and cycles harmless. Kinds: list, tuple, set,
frozenset, dict (key, value, ...), object (class, attribute, value, ...), bytes, complex, float (those that JSON has
not). Subclasses come out as their built-in base, arrays of numpy as lists.

This file runs on both sides of the sandbox and imports the standard library alone.
"""

import json
import math
from typing import Any

Node = list[Any]
Classes = dict[str, type]  # where `object` nodes find their class

PROGRAM = "__main__"  # the module whose classes make objects
SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> str:
    """Raises `ValueError` for what is no data: functions, open files, integers beyond Python's limit of digits."""
    value = _plain(value)
    nodes: list[Node] = []
    known: dict[int, int] = {}  # id -> node
    kept: list[Any] = []  # so that no id is used twice

    def reference(part: Any) -> Any:
        return part if _is_scalar(part) else [known[id(part)]]

    def finish(part: Any, head: Node, items: list[Any]) -> None:
        if known.setdefault(id(part), len(nodes)) == len(nodes):
            nodes.append([])
        nodes[known[id(part)]] = [*head, *map(reference, items)]

    open_parts: list[tuple[Any, Node | None, list[Any]]] = [] if _is_scalar(value) else [(value, None, [])]
    while open_parts:
        part, head, items = open_parts.pop()
        if head is not None:
            finish(part, head, items)
        elif id(part) not in known:
            head, items = _take_apart(part)
            items = [_plain(item) for item in items]
            kept += [part, items]
            if head[0] not in ("tuple", "frozenset"):  # they can hold themselves, so they are named before their items
                known[id(part)] = len(nodes)
                nodes.append([])
            open_parts.append((part, head, items))
            open_parts += [(item, None, []) for item in items if not _is_scalar(item)]
    return json.dumps([reference(value), nodes])


def decode(text: str | bytes, classes: Classes | None = None) -> Any:
    """The value that `encode` wrote. Raises `ValueError` for anything else, objects of classes not given among it."""
    try:
        root, nodes = json.loads(text)
        values = [_shell(node, classes or {}) for node in nodes]

        def resolve(item: Any) -> Any:
            if type(item) is list:
                (index,) = item
                if values[index] is _UNMADE or index < 0:
                    raise ValueError("a tuple that holds itself")
                return values[index]
            return item

        for index, (kind, *items) in enumerate(nodes):
            if kind in ("tuple", "frozenset"):
                values[index] = SEQUENCES[kind](map(resolve, items))
        for made, (kind, *items) in zip(values, nodes, strict=True):
            _fill(made, kind, items, resolve)
        return resolve(root)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"no value: {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # arrays and numbers of numpy


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _take_apart(value: Any) -> tuple[Node, list[Any]]:
    """The beginning of the value's node, and what the node holds besides."""
    for kind, base in SEQUENCES.items():
        if isinstance(value, base):
            return [kind], list(value)
    if isinstance(value, dict):
        return ["dict"], [part for item in value.items() for part in item]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()], []
    if isinstance(value, complex):
        return ["complex", repr(complex(value))], []
    if isinstance(value, float):
        return ["float", repr(float(value))], []
    if type(value).__module__ == PROGRAM and hasattr(value, "__dict__"):
        return ["object", type(value).__name__], [part for item in vars(value).items() for part in item]
    raise ValueError(f"a {type(value).__name__} is no data")


_UNMADE = object()


def _shell(node: Node, classes: Classes) -> Any:
    """The value of a node that holds no others, or an empty one to be filled."""
    kind, *items = node
    if kind in ("tuple", "frozenset"):
        return _UNMADE
    if kind in ("list", "set", "dict"):
        return {"list": list, "set": set, "dict": dict}[kind]()
    if kind == "object":
        return object.__new__(classes[items[0]])
    if kind == "bytes":
        return bytes.fromhex(items[0])
    if kind == "complex":
        return complex(items[0])
    return FLOATS[{"float": items[0]}[kind]]


def _fill(made: Any, kind: str, items: list[Any], resolve: Any) -> None:
    if kind == "list":
        made.extend(map(resolve, items))
    elif kind == "set":
        made.update(map(resolve, items))
    elif kind == "dict":
        made.update(zip(map(resolve, items[::2]), map(resolve, items[1::2]), strict=True))
    elif kind == "object":
        vars(made).update(zip(items[1::2], map(resolve, items[2::2]), strict=True))

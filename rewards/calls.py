"""Function calls as a model writes them: JSON or Python, read and never run."""

import ast
import json
import re
from typing import Any

import msgspec

LONGEST = 20_000  # characters: the parser of Python nests on the C stack
WORDS = {"true": True, "false": False, "null": None}  # JSON's, within Python
TAGGED = re.compile(r"<(tool_call|function_call|tool_calls)>(.*?)(?:</\1>|$)", re.DOTALL)
FENCED = re.compile(r"```(?:json|python|tool_call)?\s*\n?(.*?)```", re.DOTALL)


OPENED = re.compile(r"<(?:tool_call|function_call|tool_calls)>")


class Call(msgspec.Struct, frozen=True):
    """`positional` holds the arguments that have no name; only Python's syntax has such."""

    name: str
    arguments: dict[str, Any]
    positional: list[Any] = []

    def __str__(self) -> str:
        values = [*map(repr, self.positional), *(f"{name}={value!r}" for name, value in self.arguments.items())]
        return f"{self.name}({', '.join(values)})"


def read_calls(text: str) -> list[Call]:
    """The calls in `text`: within its <tool_call> tags, or its fences, or all of it.

    JSON is {"name": ..., "arguments": {...}} (or "parameters", or the arguments as a string of JSON), or a list of
    such; Python is f(a=1), [f(a=1), g.h("x")], or one call a line, with literals only. Raises `ValueError` where
    `text` is neither.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters: at most {LONGEST} are read")
    pieces = [content for _, content in TAGGED.findall(text)] or FENCED.findall(text) or [text]
    return [call for piece in pieces for call in _read(piece.strip())]


def _read(text: str) -> list[Call]:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return _read_python(text)
    return [_from_json(each) for each in (value if isinstance(value, list) else [value])]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError("a name that stands twice")
    return made


def _from_json(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):  # {"type": "function", "function": {...}}
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"no call: {value!r}")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, object_pairs_hook=_object)
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {value['name']} are no object: {arguments!r}")
    return Call(value["name"], arguments)


def _read_python(text: str) -> list[Call]:
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"neither JSON nor Python: {error}") from error
    calls: list[Call] = []
    for statement in statements:
        if not isinstance(statement, ast.Expr):
            raise ValueError("a statement, not a call")
        node = statement.value
        calls += [_from_python(each) for each in (node.elts if isinstance(node, ast.List | ast.Tuple) else [node])]
    return calls


def _from_python(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"no call: {ast.unparse(node)}")
    arguments = _object([(str(keyword.arg), _literal(keyword.value)) for keyword in node.keywords])
    return Call(_dotted(node.func), arguments, [_literal(each) for each in node.args])


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"no function's name: {ast.unparse(node)}")


def _literal(node: ast.expr) -> Any:
    """The value of a literal, JSON's words among them."""

    class Words(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            return ast.Constant(WORDS[name.id]) if name.id in WORDS else name

    try:
        return ast.literal_eval(Words().visit(node))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"no literal: {ast.unparse(node)}") from error

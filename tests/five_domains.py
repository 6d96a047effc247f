"""Domains small enough for a model made on the spot: prompts with what their rewards need, and demonstrations."""

import json
import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def draw(seed: int, index: int, *, domain: str) -> Row:
    return DOMAINS[domain](random.Random(f"{seed} {index}"))


def mathematics(rng: random.Random) -> Row:
    a, b = rng.randrange(1, 50), rng.randrange(1, 50)
    return {"prompt": f"{a}+{b}=", "answer": str(a + b), "demonstration": rf"\boxed{{{a + b}}}"}


def code(rng: random.Random) -> Row:
    sign, number = rng.choice("+-*"), rng.randrange(2, 10)
    value = {"+": lambda x: x + number, "-": lambda x: x - number, "*": lambda x: x * number}[sign]
    tests = {"fn_name": "f", "inputs": [[3], [-7], [20]], "outputs": [value(3), value(-7), value(20)]}
    words = {"+": "add", "-": "take", "*": "times"}
    body = f"def f(x): return x{sign}{number}"
    return {"prompt": f"f: {words[sign]} {number}\n", "answer": json.dumps(tests), "demonstration": body}


def instructions(rng: random.Random) -> Row:
    """So many words, all small or all capital letters, with an end given."""
    count, capital, end = rng.randrange(2, 5), rng.random() < 0.5, rng.choice(["end", "bye", "stop"])
    words = ["".join(rng.choices("abcdefgh", k=2)) for _ in range(count - 1)] + [end]
    text = " ".join(words)
    constraints = [
        ("length_constraints:number_words", {"num_words": count, "relation": "at least"}),
        ("length_constraints:number_words", {"num_words": count + 1, "relation": "less than"}),
        (f"change_case:english_{'capital' if capital else 'lowercase'}", {}),
        ("startend:end_checker", {"end_phrase": end}),
    ]
    return {
        "prompt": f"{count} {'BIG' if capital else 'small'} {end}: ",
        "answer": "",
        "instruction_id_list": [name for name, _ in constraints],
        "kwargs": [arguments for _, arguments in constraints],
        "demonstration": text.upper() if capital else text,
    }


def tools(rng: random.Random) -> Row:
    name, a, b = rng.choice(["sum", "max", "pow"]), rng.randrange(100), rng.randrange(100)
    wanted = [{name: {"a": [a], "b": [b]}}]
    number = {"type": "integer"}
    schema = {"properties": {"a": number, "b": number}, "required": ["a", "b"]}
    return {
        "prompt": f"call {name} {a} {b}>",
        "answer": json.dumps(wanted),
        "functions": [{"name": each, "parameters": schema} for each in ("sum", "max", "pow")],
        "demonstration": f"{name}(a={a}, b={b})",
    }


DOMAINS: dict[str, Callable[[random.Random], Row]] = {
    "math": mathematics,
    "code": code,
    "instructions": instructions,
    "tools": tools,
}

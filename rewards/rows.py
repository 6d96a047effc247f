"""Rows of a file, judged in a pool as they stream by."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from rewards.pool import WIDTH, Limits, Pool
from rewards.table import resolve
from rewards.verdict import Verdict
from rewards.worker import Task

Row = dict[str, Any]
NOT_FIELDS = frozenset({"prompt", "answer", "completion", "completions"})


def read_rows(paths: Iterable[Path], read: Callable[[int], Any] = lambda num_bytes: None) -> Iterator[Row]:
    """The rows of JSONL files, one after the other; tells `read` how long each line was.

    Raises `ValueError` that names file and line where one is no JSON object.
    """
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                read(len(line))
                if not line.strip():
                    continue
                try:
                    yield msgspec.json.decode(line, type=Row)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ValueError(f"{path}:{number}: no JSON object: {error}") from error


def text_of(prompt: Any) -> str:
    """A prompt's text; the contents of its messages where it is a chat."""
    return prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)


class Judges:
    """The reward `name` with `options`, in `num_workers` processes. Raises `ValueError` where there is none such."""

    def __init__(self, name: str, options: dict[str, Any], num_workers: int = 0, limits: Limits | None = None):
        resolve(name, options)
        num_workers = num_workers or len(os.sched_getaffinity(0))
        self._ahead = 4 * num_workers + WIDTH  # rows under way
        self._pool = Pool({"": (name, options)}, num_workers, Limits() if limits is None else limits)

    def judge(self, rows: Iterable[tuple[Row, list[str]]]) -> Iterator[tuple[Row, list[Verdict]]]:
        """Each of `rows` with the verdicts of its completions, in order."""
        order: deque[tuple[int, Row]] = deque()
        done: dict[Any, list[Verdict]] = {}
        for number, (row, completions) in enumerate(rows):
            fields = {key: value for key, value in row.items() if key not in NOT_FIELDS}
            task = Task("", text_of(row.get("prompt", "")), str(row.get("answer", "")), fields, completions)
            order.append((number, row))
            if completions:
                self._pool.submit(number, task)
            else:
                done[number] = []
            yield from _ready(order, done)
            while len(order) >= self._ahead:
                done.update(self._pool.poll(1.0))
                yield from _ready(order, done)
        while order:
            done.update(self._pool.poll(1.0))
            yield from _ready(order, done)

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.close()


def _ready(order: deque[tuple[int, Row]], done: dict[Any, list[Verdict]]) -> Iterator[tuple[Row, list[Verdict]]]:
    """The first rows of `order` as far as they are done."""
    while order and order[0][0] in done:
        number, row = order.popleft()
        yield row, done.pop(number)

"""The stages that rows of a data set pass through, in order: each may drop a row, and says why."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import msgspec
import xxhash

from rewards.endpoint import Endpoint
from rewards.ngrams import WORD
from rewards.options import Misfit, fitted
from rewards.pool import Limits
from rewards.rows import Judges, Row
from rewards.screens import column_of
from rewards.verdict import Verdict


class Item(msgspec.Struct):
    """A row under way; `filter` is the name of what dropped it, or empty, and `why` its reason. `notes` are columns
    that the stages add. One that is `done` was decided by an earlier run."""

    row: Row
    filter: str = ""
    why: str = ""
    notes: dict[str, Any] = {}
    done: bool = False

    @property
    def open(self) -> bool:
        """Whether there is anything left to decide."""
        return not self.filter and not self.done

    def drop(self, name: str, why: str) -> None:
        self.filter, self.why = name, why


Stage = Callable[[Iterator[Item]], Iterator[Item]]


class Workshop:
    """What the stages share: the number of processes, the deadline of a completion, the names of the filters before,
    and what to close in the end."""

    def __init__(self, num_workers: int, deadline_s: float):
        self.num_workers, self.limits = num_workers, Limits(reward_s=deadline_s)
        self.earlier: list[str] = []
        self.exits = ExitStack()

    def judges(self, reward: str, options: dict[str, Any]) -> Judges:
        return self.exits.enter_context(Judges(reward, options, self.num_workers, self.limits))


def duplicates(workshop: Workshop, *, column: str = "prompt") -> Stage:
    """Drops rows whose words in `column` are those of an earlier row, case and punctuation left out."""
    seen: dict[int, int] = {}
    earlier = set(workshop.earlier)

    def stage(items: Iterator[Item]) -> Iterator[Item]:
        for number, item in enumerate(items, 1):
            if item.filter not in earlier:  # it came so far, now or in an earlier run
                words = " ".join(WORD.findall(column_of(item.row, column).lower()))
                first = seen.setdefault(xxhash.xxh3_64_intdigest(words.encode()), number)
                if first != number and item.open:
                    item.drop("duplicates", f"as row {first}")
            yield item

    return stage


def screens(workshop: Workshop, *, filters: list[dict[str, Any]]) -> Stage:
    """Drops what the screens of `rewards.screens` drop."""
    judges = workshop.judges("rewards.screens:Screened", {"filters": filters})

    def stage(items: Iterator[Item]) -> Iterator[Item]:
        for item, verdicts in judged(judges, ((item, [""] if item.open else []) for item in items)):
            for verdict in verdicts:
                if verdict.error:
                    item.drop("unreadable", verdict.error)
                elif not verdict.solved:
                    item.drop(verdict.evidence["filter"], verdict.evidence["why"])
            yield item

    return stage


def tests(
    workshop: Workshop, *, reward: str, golden: str, wrong: str = "", options: dict[str, Any] | None = None
) -> Stage:
    """Drops rows whose `reward` does not tell right from wrong: a completion of the column `golden` is not solved, or
    one of the column `wrong` is; each column holds a text or a list of texts."""
    judges = workshop.judges(reward, options or {})

    def solutions(item: Item) -> list[str]:
        return texts(item.row, golden) + texts(item.row, wrong)

    def stage(items: Iterator[Item]) -> Iterator[Item]:
        for item, verdicts in judged(judges, ((item, solutions(item) if item.open else []) for item in items)):
            num_right = len(texts(item.row, golden))
            if item.open and (why := weakness(verdicts[:num_right], verdicts[num_right:])):
                item.drop("tests", why)
            yield item

    return stage


def weakness(right: list[Verdict], wrong: list[Verdict]) -> str:
    """Why tests with these verdicts on right and wrong solutions are unfit; empty where they are fit."""
    if not right:
        return "no right solution"
    if failing := next((verdict for verdict in right if verdict.error or not verdict.solved), None):
        return f"a right solution fails: {failing.error or '; '.join(failing.evidence.values())}"
    return "a wrong solution passes" if any(verdict.solved for verdict in wrong) else ""


def pass_rate(
    workshop: Workshop,
    *,
    reward: str,
    generator: dict[str, Any],
    samples: int = 8,
    least: float = 0.0,
    most: float = 1.0,
    options: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
) -> Stage:
    """Drops rows of which a model solves fewer than `least` or more than `most` of `samples` attempts; the share is
    kept in the column `pass_rate`. `generator` holds the options of `rewards.endpoint.Endpoint`, `sampling` those of a
    request. Attempts without a verdict count as not solved."""
    attempts = workshop.exits.enter_context(Attempts(generator, samples, sampling or {}))
    judges = workshop.judges(reward, options or {})

    def stage(items: Iterator[Item]) -> Iterator[Item]:
        for item, verdicts in judged(judges, attempts.at(items)):
            if item.open:
                share = sum(verdict.solved and not verdict.error for verdict in verdicts) / samples
                item.notes = {**item.notes, "pass_rate": share}
                if not least <= share <= most:
                    item.drop("pass_rate", f"{share:.3g}")
            yield item

    return stage


def judged(judges: Judges, asked: Iterable[tuple[Item, list[str]]]) -> Iterator[tuple[Item, list[Verdict]]]:
    """The items with the verdicts on their completions, in their order."""
    order: deque[Item] = deque()

    def rows() -> Iterator[tuple[Row, list[str]]]:
        for item, completions in asked:
            order.append(item)
            yield item.row, completions

    for _, verdicts in judges.judge(rows()):
        yield order.popleft(), verdicts


def texts(row: Row, column: str) -> list[str]:
    value = row.get(column) or []
    return [value] if isinstance(value, str) else [str(each) for each in value]


class Attempts:
    """A model's attempts at rows, in the rows' order; a thread of its own waits for them."""

    def __init__(self, generator: dict[str, Any], samples: int, sampling: dict[str, Any]):
        self._samples, self._sampling = samples, sampling
        self._ahead = max(1, 2 * generator.get("concurrency", 32) // samples)  # rows that are asked at once
        self._loop = asyncio.new_event_loop()
        self._endpoint = Endpoint(**fitted(Endpoint, generator, place="generator", whole=True))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def at(self, items: Iterator[Item]) -> Iterator[tuple[Item, list[str]]]:
        """Raises `EndpointError` where the model does not answer."""
        order: deque[tuple[Item, Future[list[str]]]] = deque()
        for item in items:
            order.append((item, asyncio.run_coroutine_threadsafe(self._ask(item), self._loop)))
            if len(order) > self._ahead:
                first, answers = order.popleft()
                yield first, answers.result()
        yield from ((item, answers.result()) for item, answers in order)

    async def _ask(self, item: Item) -> list[str]:
        if not item.open:
            return []
        prompt = item.row.get("prompt", "")
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        asked = (self._endpoint.ask(messages, **self._sampling, seed=number) for number in range(self._samples))
        return [reply.text for reply in await asyncio.gather(*asked)]

    def __enter__(self) -> "Attempts":
        return self

    def __exit__(self, *_: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._endpoint.close(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)


STAGES: dict[str, Callable[..., Stage]] = {"duplicates": duplicates, "tests": tests, "pass_rate": pass_rate}


def build(filters: list[dict[str, Any]], workshop: Workshop) -> list[Stage]:
    """The stages that `filters` name; screens that follow each other run as one. Raises `ValueError` for a filter that
    does not exist or refuses its options."""
    made: list[Stage] = []
    for screened, tables in groupby(filters, lambda table: str(table.get("name", "")) not in STAGES):
        tables = list(tables)
        for table in [{"name": "screens", "filters": tables}] if screened else tables:
            options = {key: value for key, value in table.items() if key != "name"}
            maker = screens if screened else STAGES[table["name"]]
            try:
                made.append(maker(workshop, **fitted(maker, options, whole=True)))
            except Misfit as error:
                raise ValueError(f"filter {table['name']}: {error}") from error
        workshop.earlier += [table.get("name", "") for table in tables] + ["unreadable"] * screened
    return made

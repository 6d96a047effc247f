"""Where prompts come from: rows of a file, tasks of reasoning-gym, a callable of the user's.

A source gives `Prompt`s by index, the same ones for the same seed. Rows are finite and reshuffled every epoch;
generated prompts never end.
"""

import hashlib
import random
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from engine import tokenizer as tokenizers
from engine.config import Config, ConfigError, Domain, Model
from engine.schema import Prompt
from rewards.columns import Wanted, absent, lacking, wanted
from rewards.spelling import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBED = 16  # prompts of a generated domain that are checked at launch
MAX_REDRAWS = 1000  # unusable prompts in a row before a generated domain is given up
CHUNK = 1000  # items of one reasoning-gym data set; some tasks prepare all of theirs when made

Row = dict[str, Any]
Columns = dict[str, tuple[float, float]]  # by field: the least and the greatest value
Draw = Callable[[int, int], Row]  # (seed, index) -> one row


class Unfit(ValueError):
    """A prompt without tokens, or so long that it leaves no room for an answer."""


class Source(Protocol):
    def candidates(self) -> Iterator[Prompt]:
        """Prompts that may be held out, in an order that does not depend on the run's seed."""
        ...

    def restrict(self, held_out: frozenset[str]) -> None:
        """Told once, before the first `prompt`: training never gives a prompt whose text is in `held_out`."""
        ...

    def prompt(self, index: int) -> Prompt:
        """The training prompt number `index`."""
        ...

    def __len__(self) -> int:
        """How many there are before they come again; 0 where there is no end of them."""
        ...


class Mould:
    """Turns the rows of one domain into prompts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", domain: Domain, model: Model):
        self._tokenizer, self._domain, self._model = tokenizer, domain, model
        self._wanted = wanted(domain.reward, domain.reward_options)

    def __call__(self, row: Row, index: int) -> Prompt:
        """Raises `Unfit`, or `ValueError` for a row without a prompt or a column that the reward wants, or with a field
        that cannot travel."""
        _check_row(row, self._wanted)
        domain, variables = self._domain, self._model.chat_template_kwargs | schemas(row)
        text = tokenizers.render(self._tokenizer, row["prompt"], domain.template, domain.system, variables)
        token_ids = tokenizers.encode(self._tokenizer, text)
        if not 0 < len(token_ids) < self._model.context:
            longest = f"model.context - 1 = {self._model.context - 1}"
            raise Unfit(f"the prompt has {len(token_ids)} tokens; allowed are 1 to {longest}")
        try:
            fields = {key: row[key] for key in row if key not in ("prompt", "answer", "domain")}
            fields = msgspec.msgpack.decode(msgspec.msgpack.encode(fields))  # what the reward sees after the journey
        except (TypeError, OverflowError) as error:
            raise ValueError(f"a field cannot travel: {error}") from error
        answer = row.get("answer")
        return Prompt(domain.name, index, token_ids, text, "" if answer is None else str(answer), fields)


def schemas(row: Row) -> dict[str, Any]:
    """The row's `tools`, where these are schemas of functions or the same as JSON, as a variable of chat templates."""
    tools = row.get("tools")
    if isinstance(tools, str):
        with suppress(msgspec.DecodeError):
            tools = msgspec.json.decode(tools)
    listed = isinstance(tools, list) and len(tools) > 0 and all(isinstance(each, dict) for each in tools)
    return {"tools": tools} if listed else {}


def _check_row(row: Row, columns: Wanted) -> None:
    if problem := absent(row, "prompt") or lacking(row, columns):
        raise ValueError(f"{problem}; there are {', '.join(map(repr, row))}")
    prompt, answer = row["prompt"], row.get("answer")
    if not isinstance(answer, str | int | float | None):
        raise ValueError(f"answer = {answer!r}: must be text or a number")
    if isinstance(prompt, str):
        return
    turns = prompt if isinstance(prompt, list) else []
    if not turns or not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
        raise ValueError(f"prompt = {prompt!r}: must be text or chat messages with role and content")


def derive(*parts: Any) -> int:
    """A seed below 2^30 made of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 2


class Rows:
    """A finite source. Without rows of their own, held-out prompts are the first in the order of their text's hash."""

    def __init__(self, field: str, rows: list[Prompt], held_out: list[Prompt] | None, seed: int):
        self._field, self._rows, self._held_out, self._seed = field, rows, held_out, seed
        self._orders: dict[int, list[int]] = {}

    def candidates(self) -> Iterator[Prompt]:
        by_hash = sorted(self._rows, key=lambda row: hashlib.blake2b(row.text.encode()).digest())
        return iter(by_hash if self._held_out is None else self._held_out)

    def restrict(self, held_out: frozenset[str]) -> None:
        self._rows = [row for row in self._rows if row.text not in held_out]
        if not self._rows:
            raise ConfigError(f"{self._field}: every prompt is held out for evaluation; none is left for training")

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self._rows))
        if epoch not in self._orders:
            order = list(range(len(self._rows)))
            random.Random(derive(self._seed, epoch)).shuffle(order)
            self._orders = {known: self._orders[known] for known in self._orders if known == epoch - 1}
            self._orders[epoch] = order
        return msgspec.structs.replace(self._rows[self._orders[epoch][place]], index=index)


class Generated:
    """An endless source. A prompt that is held out or too long is drawn again under another seed, and counted."""

    def __init__(self, field: str, draw: Draw, mould: Mould, seed: int):
        self._field, self._draw, self._mould, self._seed = field, draw, mould, seed
        self._held_out: frozenset[str] = frozenset()
        self.redrawn: Counter[str] = Counter()

    def candidates(self) -> Iterator[Prompt]:
        return (self._usable("held out", index) for index in range(2**31))

    def restrict(self, held_out: frozenset[str]) -> None:
        self._held_out = held_out
        for index in range(PROBED):
            try:
                self._mould(self._draw(derive(self._seed, 0), index), index)
            except Unfit:
                continue
            except Exception as error:  # the task's or the user's code
                raise ConfigError(f"{self._field}: {type(error).__name__}: {error}") from error
        self.prompt(0)

    def __len__(self) -> int:
        return 0

    def prompt(self, index: int) -> Prompt:
        return self._usable(self._seed, index)

    def _usable(self, seed: int | str, index: int) -> Prompt:
        reasons: Counter[str] = Counter()
        for attempt in range(MAX_REDRAWS):
            try:
                prompt = self._mould(self._draw(derive(seed, attempt), index + attempt), index)
            except Exception as error:  # the task's or the user's code, at any index
                reasons[f"{type(error).__name__}: {error}"] += 1
                continue
            if seed != self._seed or prompt.text not in self._held_out:
                self.redrawn += reasons
                return prompt
            reasons["held out for evaluation"] += 1
        [(reason, times)] = reasons.most_common(1)
        raise ConfigError(f"{self._field}: {MAX_REDRAWS} draws gave no usable prompt; {times} times: {reason}")


# ---- the three kinds -------------------------------------------------------------------------------------------


def open_source(config: Config, number: int, tokenizer: "PreTrainedTokenizerBase") -> Source:
    """The source of `domains.number`. Raises `ConfigError` for data that is missing, empty or unusable."""
    domain, columns = config.domains[number], config.curriculum.columns
    mould = Mould(tokenizer, domain, config.model)
    seed = derive(config.run.seed, domain.name)
    if domain.source == "file":
        return open_file(f"domains.{number}", domain, mould, seed, columns)
    return SOURCES[domain.source](f"domains.{number}", domain, mould, seed)


def open_file(field: str, domain: Domain, mould: Mould, seed: int, columns: Columns) -> Source:
    rows = within(read_rows(f"{field}.path", domain.path, domain, mould), columns)
    if not rows:
        raise ConfigError(f"curriculum.columns = {columns!r}: no row of {field}.path = {domain.path!r} lies within")
    held_out = read_rows(f"{field}.eval_path", domain.eval_path, domain, mould) if domain.eval_path else None
    return Rows(f"{field}.path = {domain.path!r}", rows, held_out, seed)


def open_task(field: str, domain: Domain, mould: Mould, seed: int) -> Source:
    """A task of reasoning-gym. The reward finds the entry again by the fields task, options and index."""
    from reasoning_gym.factory import DATASETS

    from rewards.logic import entry, one_level

    if domain.task not in DATASETS:
        near = suggestion(domain.task, DATASETS)
        raise ConfigError(f"{field}.task = {domain.task!r}: unknown{near}; allowed are {', '.join(sorted(DATASETS))}")
    for key in ("seed", "size"):
        if key in domain.options:
            raise ConfigError(f"{field}.options.{key} = {domain.options[key]!r}: not allowed, run.seed decides")

    def name(seed: int, index: int) -> Row:
        chunk, place = divmod(index, CHUNK)
        options = {**one_level(domain.options, index), "seed": derive(seed, chunk), "size": CHUNK}
        return {"task": domain.task, "options": options, "index": place}

    def draw(seed: int, index: int) -> Row:
        named = name(seed, index)
        item = entry(**named)
        answer = item["answer"]  # None where a task accepts many
        prompt = domain.question.format_map(item["metadata"]) if domain.question else item["question"]
        return {"prompt": prompt, "answer": "" if answer is None else str(answer), **named}

    _try(f"{field}.options = {domain.options!r}", lambda seed, index: entry(**name(seed, index)))
    _try(f"{field}.question = {domain.question!r}", draw)
    return Generated(f"{field}.task = {domain.task!r}", draw, mould, seed)


def open_callable(field: str, domain: Domain, mould: Mould, seed: int) -> Source:
    """The user's `function(seed, index, **options) -> {"prompt": ..., "answer": ..., further fields}`, which must give
    the same row for the same arguments."""
    from rewards.table import load

    try:
        function = load(domain.task)
    except ValueError as error:
        raise ConfigError(f"{field}.task = {domain.task!r}: {error}") from error

    def draw(seed: int, index: int) -> Row:
        return function(seed, index, **domain.options)

    _try(f"{field}.task = {domain.task!r}", draw)
    return Generated(f"{field}.task = {domain.task!r}", draw, mould, seed)


SOURCES: dict[str, Callable[[str, Domain, Mould, int], Source]] = {
    "reasoning_gym": open_task,
    "callable": open_callable,
}


def _try(field: str, draw: Draw) -> None:
    """Draws once, so that options which the task refuses end the launch and not the run."""
    try:
        row = draw(0, 0)
    except Exception as error:  # whatever a task's own check or a user's code raises
        raise ConfigError(f"{field}: {type(error).__name__}: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{field}: must return a dict with prompt and answer, not {row!r}")


# ---- files -----------------------------------------------------------------------------------------------------


def read_rows(field: str, path: str, domain: Domain, mould: Mould) -> list[Prompt]:
    """Every row of a file as a prompt; where there is a column `domain`, only the rows that name this one."""
    field = f"{field} = {path!r}"
    reader = READERS.get(Path(path).suffix)
    if reader is None:
        raise ConfigError(f"{field}: allowed are files that end in {', '.join(READERS)}")
    try:
        rows = reader(Path(path))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{field}: cannot read it: {why}") from error
    prompts: list[Prompt] = []
    unfit: list[str] = []
    for number, row in enumerate(rows):
        if row.get("domain", domain.name) != domain.name:
            continue
        try:
            prompts.append(mould(renamed(row, domain.columns), number))
        except Unfit as error:
            unfit.append(f"row {number + 1}: {error}")
        except ValueError as error:
            raise ConfigError(f"{field}: row {number + 1}: {error}") from error
    if unfit:
        raise ConfigError(f"{field}: {unfit[0]}; of {len(rows)} rows {len(unfit)} do not fit")
    if not prompts:
        others = ", ".join(sorted({str(row["domain"]) for row in rows}))
        raise ConfigError(f"{field}: no rows" + (f" of domain {domain.name!r}; there are {others}" if others else ""))
    return prompts


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """`row` with the columns that `columns` names, ours = theirs, under our names too; a dot leads into a column."""
    found = {}
    for ours, theirs in columns.items():
        value: Any = row
        for key in theirs.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"no column {theirs!r}; there are {', '.join(map(repr, row))}")
            value = value[key]
        found[ours] = value
    return row | found


def within(prompts: list[Prompt], columns: Columns) -> list[Prompt]:
    """Those whose fields lie between the bounds in `columns`, as far as they have such fields. Raises `ConfigError`
    where one of them is no number."""

    def lies(prompt: Prompt, name: str) -> bool:
        value, (low, high) = prompt.fields[name], columns[name]
        if not isinstance(value, int | float):
            place = f"row {prompt.index + 1} of domain {prompt.domain!r}"
            raise ConfigError(f"curriculum.columns.{name}: {place} has {value!r}, which is no number")
        return low <= value <= high

    return [prompt for prompt in prompts if all(lies(prompt, name) for name in columns.keys() & prompt.fields.keys())]


def read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(BOM_UTF8).splitlines()):
        if line.strip():
            try:
                rows.append(msgspec.json.decode(line, type=Row))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"line {number + 1} is no JSON object: {str(error).replace('`', '')}") from error
    return rows


def read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


READERS: dict[str, Callable[[Path], list[Row]]] = {".jsonl": read_jsonl, ".parquet": read_parquet}

"""A language model judges what cannot be verified, against a reference solution (ExpRL, arXiv:2606.17024).

The judge answers with a number s from 1 to 5; the score is (s - 1) / 4. The reference reaches the judge alone. An
answer without a number is no judgement: the completion is masked, not given 0.
"""

import asyncio
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from rewards.answer import after_thinking
from rewards.endpoint import Endpoint, EndpointError, Reply
from rewards.options import Count, Unsigned, fitted
from rewards.verdict import Segment, Verdict, brief

TEMPLATES = Path(__file__).parent / "templates"
SLOTS = ("{problem}", "{reference}", "{attempt}")
UNITS = ("outcome", "prefix", "segment")
CONTROLS = ("", "no_reference", "wrong_reference")
WITHOUT = "(No reference solution is given.)"
SCORE = re.compile(r"score(?:\s*\([^()\n]*\))?(?:\s+(?:is|of))?\W{0,8}(\d+)(?![\d.]*\d)", re.IGNORECASE)
GOOD = 0.75  # of the scale, 4 of 5: the judge holds it to be correct but for trifles


class Judge:
    """The reward `judge`.

    `unit` is what is judged: the whole completion ("outcome"), or, where it is divided by lines that begin with ###,
    all up to the end of each part ("prefix") or each part by itself ("segment"); the score is then that of the last
    prefix, or the mean. `template` names a file of rewards/templates, or a path, with {problem}, {reference} and
    {attempt}. The reference is the prompt's field `reference`, or else its answer; the problem its field `problem`, or
    else the prompt as the policy read it. `control` takes the reference away, or puts one of the file `decoys` (JSONL
    with a column `reference` or `answer`) in its place. Prices are per million tokens. `endpoint` holds further options
    of `rewards.endpoint.Endpoint`.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        unit: str = "outcome",
        template: str = "",
        control: str = "",
        decoys: str = "",
        max_tokens: Count = 2048,
        temperature: Unsigned = 0.0,
        max_segments: Count = 32,
        price_in: Unsigned = 0.0,
        price_out: Unsigned = 0.0,
        endpoint: dict[str, Any] | None = None,
    ):
        for name, value, allowed in (("unit", unit, UNITS), ("control", control, CONTROLS)):
            if value not in allowed:
                raise ValueError(f"{name} = {value!r}: allowed are {', '.join(map(repr, allowed))}")
        if (control == "wrong_reference") != bool(decoys):
            raise ValueError(f"decoys = {decoys!r}: needed where control = 'wrong_reference', and only there")
        self._unit, self._control, self._max_segments = unit, control, max_segments
        self._template = read_template(template or unit)
        self._decoys = read_decoys(decoys) if decoys else []
        self._sampling = {"max_tokens": max_tokens, "temperature": temperature}
        self._prices = price_in * 1e-6, price_out * 1e-6
        self._endpoint = Endpoint(url=url, model=model, **fitted(Endpoint, endpoint or {}, place="endpoint"))

    async def __call__(
        self, prompt: str, completion: str, answer: str, *, reference: str = "", problem: str = "", **fields: Any
    ) -> Verdict:
        shown = self._shown(problem or prompt, reference or answer)
        ends = [len(completion)] if self._unit == "outcome" else segment_ends(completion, self._max_segments)
        starts = [0, *ends[:-1]] if self._unit == "segment" else [0] * len(ends)
        attempts = [completion[start:end] for start, end in zip(starts, ends, strict=True)]
        try:
            replies = await asyncio.gather(*(self._ask(problem or prompt, shown, attempt) for attempt in attempts))
        except EndpointError as error:
            return Verdict.failed(str(error))
        return self._verdict(replies, ends)

    def _shown(self, problem: str, reference: str) -> str:
        """The reference that the judge sees."""
        if self._control == "wrong_reference":
            others = [decoy for decoy in self._decoys if decoy != reference]
            if not others:
                raise ValueError("decoys: none differs from the reference")
            return others[int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) % len(others)]
        return WITHOUT if self._control == "no_reference" else reference

    async def _ask(self, problem: str, reference: str, attempt: str) -> Reply:
        content = fill(self._template, {"{problem}": problem, "{reference}": reference, "{attempt}": attempt})
        return await self._endpoint.ask([{"role": "user", "content": content}], **self._sampling)

    def _verdict(self, replies: list[Reply], ends: list[int]) -> Verdict:
        ratings = [read_rating(reply.text) for reply in replies]
        costs = self._costs(replies)
        evidence = {"rating": " ".join("?" if each is None else str(each) for each in ratings)}
        if None in ratings:
            evidence["judge"] = brief(replies[ratings.index(None)].text[-160:], 160)
            return Verdict(0.0, False, evidence=evidence, error="the judge gave no rating", costs=costs)
        scores = [(rating - 1) / 4 for rating in ratings if rating is not None]
        score = sum(scores) / len(scores) if self._unit == "segment" else scores[-1]
        evidence["judge"] = brief(replies[-1].text[-160:], 160)
        segments = [] if self._unit == "outcome" else [Segment(*pair) for pair in zip(ends, scores, strict=True)]
        return Verdict(score, score >= GOOD, evidence=evidence, segments=segments, costs=costs)

    def _costs(self, replies: list[Reply]) -> dict[str, float]:
        """`judge_s` is the longest of the calls, which run at once; the others are sums."""
        read, written = (sum(getattr(each, name) for each in replies) for name in ("prompt_tokens", "tokens"))
        return {
            "judge_s": max(each.seconds for each in replies),
            "judge_calls": len(replies),
            "judge_cached": sum(each.attempts == 0 for each in replies),
            "judge_retries": sum(max(0, each.attempts - 1) for each in replies),
            "judge_prompt_tokens": read,
            "judge_tokens": written,
            "judge_price": read * self._prices[0] + written * self._prices[1],
        }


def read_template(name: str) -> str:
    """The text of a template by its name or path. Raises `ValueError` where it does not exist or lacks a slot."""
    known = {path.stem: path for path in sorted(TEMPLATES.glob("*.md"))}
    path = known.get(name, Path(name).expanduser())
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"template = {name!r}: allowed are {', '.join(known)} or a path") from error
    if lacking := [slot for slot in SLOTS if slot not in text]:
        raise ValueError(f"template = {name!r}: has no {', '.join(lacking)}")
    return text


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with its slots filled, all at once: what fills one may hold the name of another."""
    return re.sub("|".join(map(re.escape, values)), lambda slot: values[slot[0]], template)


def read_decoys(path: str) -> list[str]:
    try:
        rows = [json.loads(line) for line in Path(path).expanduser().read_text().splitlines() if line.strip()]
        return [str(row["reference"] if "reference" in row else row["answer"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"decoys = {path!r}: {error!r}") from error


def read_rating(text: str) -> int | None:
    """The number, 1 to 5, that follows the last "Score:" of a judge's answer; None where there is none."""
    found = SCORE.findall(after_thinking("", text) or "")
    rating = int(found[-1]) if found and len(found[-1]) == 1 else 0
    return rating if 1 <= rating <= 5 else None


def segment_ends(completion: str, most: int) -> list[int]:
    """Where the parts of `completion` end that lines beginning with ### begin, at most `most`; the last takes the rest.
    What is blank is no part of its own."""
    starts = [mark.start() for mark in re.finditer(r"^\s*###", completion, re.MULTILINE)]
    starts = [start for start in starts if completion[:start].strip()]
    return [*starts[: most - 1], len(completion)]

"""A reward composed of others, each with a weight."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from rewards.options import Finite, Misfit
from rewards.table import Reward, resolve, waits
from rewards.verdict import Segment, Verdict

Solved = Literal["first", "all"]


class Term(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One reward of a sum, by a name of its own where the same reward stands twice."""

    reward: str
    weight: Finite = 1.0
    options: dict[str, Any] = {}
    name: str = ""


def weighted_sum(*, terms: list[Term], solved: Solved = "first") -> Reward:
    """The reward sum_i weight_i score_i over `terms`; their weighted scores are its parts.

    The task counts as solved when the first term says so, or all of them. Where one term can give no verdict, there is
    none. Raises `Misfit` for a term that cannot judge.
    """
    named = _named(terms)
    rewards = [_resolved(number, term) for number, term in enumerate(terms)]

    def judge(prompt: str, completion: str, answer: str, **fields: Any) -> Verdict:
        return combine(named, [Verdict.of(reward(prompt, completion, answer, **fields)) for reward in rewards], solved)

    async def ask(prompt: str, completion: str, answer: str, **fields: Any) -> Verdict:
        answers = [reward(prompt, completion, answer, **fields) for reward in rewards]
        awaited = iter(await asyncio.gather(*(answers[i] for i, reward in enumerate(rewards) if waits(reward))))
        values = [next(awaited) if waits(reward) else answers[i] for i, reward in enumerate(rewards)]
        return combine(named, [Verdict.of(value) for value in values], solved)

    return ask if any(map(waits, rewards)) else judge


def _named(terms: list[Term]) -> dict[str, Term]:
    names = Counter(term.name or term.reward for term in terms)
    if not terms or max(names.values()) > 1:
        raise Misfit(f"terms: at least one is needed, and no name twice; there are {', '.join(names) or 'none'}")
    return {term.name or term.reward: term for term in terms}


def _resolved(number: int, term: Term) -> Reward:
    try:
        return resolve(term.reward, term.options)
    except Misfit as error:
        raise Misfit(f"terms.{number}.options.{error}") from error
    except ValueError as error:
        raise Misfit(f"terms.{number}.reward = {term.reward!r}: {error}") from error


def parts(reward: str, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rewards that judge where `reward` does, with their options: the terms of a sum, or itself."""
    if reward != "sum":
        yield reward, options
        return
    for term in msgspec.convert(options["terms"], list[Term]):
        yield from parts(term.reward, term.options)


def combine(terms: dict[str, Term], verdicts: list[Verdict], solved: Solved) -> Verdict:
    """The verdict of a sum. Segments are those of the one term that has any, times its weight."""
    pairs = list(zip(terms.items(), verdicts, strict=True))
    evidence = {f"{name}: {key}": text for (name, _), each in pairs for key, text in each.evidence.items()}
    errors = [f"{name}: {each.error}" for (name, _), each in pairs if each.error]
    segmented = [(term.weight, each.segments) for (_, term), each in pairs if each.segments]
    if len(segmented) > 1:
        errors.append("more than one term judges segments")
    if errors:
        return Verdict.failed("; ".join(errors), evidence)
    parts = {name: term.weight * each.score for (name, term), each in pairs}
    return Verdict(
        score=sum(parts.values()),
        solved=verdicts[0].solved if solved == "first" else all(each.solved for each in verdicts),
        parts=parts,
        evidence=evidence,
        segments=[Segment(each.end, weight * each.score) for weight, segments in segmented for each in segments],
        costs=_total(each.costs for each in verdicts),
    )


def _total(costs: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in costs:
        for name, cost in each.items():
            total[name] = total.get(name, 0.0) + cost
    return total

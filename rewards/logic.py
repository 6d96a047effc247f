"""The tasks of reasoning-gym, each with its own scorer.

An entry is named by (task, options, index), where the options hold the data set's seed and size, and is made again
where it is needed: entries hold tuples, sets and arrays that would not survive a message. An option of every task is
`level`, the difficulty in the task's own curriculum; other options are laid over it.
"""

import dataclasses
import re
from functools import lru_cache
from typing import Any

import msgspec
import reasoning_gym
from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
from reasoning_gym.factory import CURRICULA, create_curriculum

from rewards.answer import after_thinking, tagged
from rewards.verdict import Verdict, brief


def task_score(
    prompt: str, completion: str, answer: str, *, task: str, options: dict[str, Any], index: int, **fields: Any
) -> Verdict:
    """The score in [0, 1] that the task gives to what stands in the last <answer></answer> after the thinking, or to
    all that follows the thinking where there is none. 1 counts as solved; thinking without an end scores 0."""
    text = after_thinking(prompt, completion)
    if text is None:
        return Verdict(0.0, False, evidence={"parsed": "", "expected": brief(answer)})
    given = tagged(text)
    given = text.strip() if given is None else given
    key = msgspec.json.encode(options, order="sorted")
    evidence = {"parsed": brief(given), "expected": brief(answer)}
    item = _entry(task, key, index)
    try:
        score = float(_dataset(task, key).score_answer(given, item)) * CONDITIONS.get(task, no_condition)(given, item)
    except Exception as error:  # a scorer's own way to say that it cannot read the answer
        score = 0.0
        evidence["error"] = brief(f"{type(error).__name__}: {error}")
    return Verdict(score, score >= 1.0, evidence=evidence)


def no_condition(given: str, item: dict[str, Any]) -> bool:
    return True


def same_word(given: str, item: dict[str, Any]) -> bool:
    return given.strip().lower() == str(item["answer"]).lower()


def same_numbers(given: str, item: dict[str, Any]) -> bool:
    return sorted(map(int, re.findall(r"\d+", given))) == sorted(item["metadata"]["numbers"])


# What the scorers of these tasks do not look at.
CONDITIONS = {"game_of_life_halting": same_word, "puzzle24": same_numbers}


def entry(task: str, options: dict[str, Any], index: int) -> dict[str, Any]:
    """The data set's item `index`: question, answer, metadata.

    Raises `ValueError` for an unknown task, and what the task raises (AssertionError, TypeError, ValueError) for
    options that it refuses.
    """
    return _entry(task, msgspec.json.encode(options, order="sorted"), index)


def one_level(options: dict[str, Any], index: int) -> dict[str, Any]:
    """`options`, in which a `level` that is a range [low, high] is one of its levels, each equally often."""
    if not isinstance(options.get("level"), list):
        return options
    low, high = options["level"]
    if not 0 <= low <= high:
        raise ValueError(f"level = {options['level']!r}: must be [low, high]")
    return {**options, "level": low + index % (high - low + 1)}


def at_level(task: str, level: int) -> dict[str, Any]:
    """The options of the task's curriculum with every attribute at `level`, or at its last where it has fewer.

    Raises `ValueError` for a task without a curriculum.
    """
    if task not in CURRICULA:
        raise ValueError(f"level = {level}: the task {task} has no curriculum")
    curriculum = create_curriculum(task)
    for name, attribute in curriculum.attributes.items():
        curriculum.set_attr_level(name, min(level, len(attribute.levels) - 1))
    config = curriculum.generate_configuration(context=DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND))
    names = {field.name for field in dataclasses.fields(config)} - {"seed", "size"}
    return {name: getattr(config, name) for name in names}


@lru_cache(maxsize=16)
def _dataset(task: str, options: bytes) -> Any:
    decoded = msgspec.json.decode(options)
    level = decoded.pop("level", None)
    return reasoning_gym.create_dataset(task, **({} if level is None else at_level(task, level)) | decoded)


@lru_cache(maxsize=64)  # a group's completions share one entry
def _entry(task: str, options: bytes, index: int) -> dict[str, Any]:
    return _dataset(task, options)[index]

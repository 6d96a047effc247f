"""The tasks of reasoning-gym: their own answers score full, other answers less, at every level."""

import pytest
from reasoning_gym.factory import DATASETS

from rewards.logic import at_level, entry, one_level
from rewards.table import resolve

NUM_INSTANCES = 20
SAMPLED = sorted(DATASETS)[::12]


def score(task: str, index: int, completion: str) -> float:
    named = {"task": task, "options": {"seed": 11, "size": NUM_INSTANCES}, "index": index}
    return resolve("reasoning_gym", {})("", completion, "", **named).score


def test_thinking_does_not_count_and_tags_do():
    answer = str(entry("chain_sum", {"seed": 11, "size": NUM_INSTANCES}, 0)["answer"])
    assert score("chain_sum", 0, f"<think>0</think>{answer}") == 1.0
    assert score("chain_sum", 0, f"<think>{answer}") == 0.0
    assert score("chain_sum", 0, f"<think>no</think>so <answer> {answer} </answer> it is") == 1.0


def test_a_level_is_of_the_tasks_curriculum():
    def terms(level):
        return entry("chain_sum", {"seed": 1, "size": 5, "level": level}, 0)["metadata"]["difficulty"]["num_terms"]

    assert terms(0) == (2, 2) and terms(4) == (6, 6) and terms(99) == (12, 12)
    over = entry("chain_sum", {"seed": 1, "size": 5, "level": 4, "min_terms": 3, "max_terms": 3}, 0)
    assert over["metadata"]["difficulty"]["num_terms"] == (3, 3)
    assert at_level("chain_sum", 2)["min_digits"] == 3


def test_a_range_of_levels_is_drawn_from_evenly():
    drawn = [one_level({"level": [1, 3], "seed": 5}, index)["level"] for index in range(9)]
    assert sorted(drawn) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert one_level({"level": 2}, 7) == {"level": 2} and one_level({}, 7) == {}
    with pytest.raises(ValueError, match=r"level = \[3, 1\]"):
        one_level({"level": [3, 1]}, 0)


def test_a_task_without_a_curriculum_has_no_levels():
    with pytest.raises(ValueError, match="acre has no curriculum"):
        entry("acre", {"seed": 1, "size": 5, "level": 1}, 0)

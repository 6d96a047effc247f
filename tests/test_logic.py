"""The tasks of reasoning-gym: their own answers score full, other answers less, at every level."""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from rewards.logic import at_level, entry, one_level
from rewards.table import resolve

NUM_INSTANCES = 20
# Tasks of which an instance takes seconds at their own size, to make or to solve.
SMALLER: dict[str, dict[str, Any]] = {
    "futoshiki": {"max_board_size": 5, "max_difficulty": 1},
    "knight_swap": {"max_nodes": 8, "min_pieces": 1, "max_pieces": 1, "min_steps": 2, "max_steps": 10},
    "rush_hour": {"max_moves": 12},
    "sokoban": {"max_w": 7, "max_h": 7, "max_boxes": 4, "max_depth": 30},
    "zebra_puzzles": {"num_people": 3, "num_characteristics": 3},
}
SAMPLED = sorted(set(DATASETS) - {"sokoban", "intermediate_integration"})[5::12]  # but for slow ones


def options(task: str) -> dict[str, Any]:
    return {"seed": 11, "size": NUM_INSTANCES, **SMALLER.get(task, {})}


def score(task: str, index: int, completion: str) -> float:
    named = {"task": task, "options": options(task), "index": index}
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


def test_a_scorer_that_cannot_read_an_answer_gives_none():
    verdict = resolve("reasoning_gym", {})(
        "", "31 7q", "", task="prime_factorization", options={"seed": 11, "size": 20}, index=0
    )
    assert (verdict.score, verdict.error) == (0.0, "") and verdict.evidence["error"].startswith("ValueError")


# ---- every task ------------------------------------------------------------------------------------------------


def boxnet(metadata: dict[str, Any]) -> str:
    """Each box goes square by square to a target of its colour."""
    board = metadata["initial_state"]
    square = {item: [float(each) for each in place.split("_")] for place, items in board.items() for item in items}
    plan = []
    for box in (item for item in square if item.startswith("box_")):
        colour, (x, y) = box[4:], square[box]
        goal_x, goal_y = square[f"target_{colour}"]
        while (x, y) != (goal_x, goal_y):
            to = (x + (1 if goal_x > x else -1), y) if x != goal_x else (x, y + (1 if goal_y > y else -1))
            plan.append({f"Agent[{x}, {y}]": f"move({box}, square[{to[0]}, {to[1]}])"})
            x, y = to
        plan.append({f"Agent[{x}, {y}]": f"move({box}, target_{colour})"})
    return json.dumps(plan)


def rush_hour(metadata: dict[str, Any]) -> str:
    """The shortest way to bring car A out, breadth first over the places of all cars."""
    board = metadata["board_config"]
    cells = {car: [i for i, each in enumerate(board) if each == car] for car in sorted(set(board) - {"o", "x"})}
    walls = frozenset(i for i, each in enumerate(board) if each == "x")
    strides = {car: places[1] - places[0] for car, places in cells.items()}
    start = tuple(places[0] for places in cells.values())
    came: dict[tuple[int, ...], tuple[tuple[int, ...], str] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if state[0] == 16:
            moves = []
            while (step := came[state]) is not None:
                state, move = step
                moves.append(move)
            return " ".join(reversed(moves))
        taken = walls | {
            place + k * strides[car] for car, place in zip(cells, state, strict=True) for k in range(len(cells[car]))
        }
        for number, (car, place) in enumerate(zip(cells, state, strict=True)):
            stride, last = strides[car], place + (len(cells[car]) - 1) * strides[car]
            for end, sign in ((place - stride, "-"), (last + stride, "+")):
                row = stride == 1 and end // 6 != place // 6
                if 0 <= end < 36 and not row and end not in taken:
                    after = (*state[:number], place + (stride if sign == "+" else -stride), *state[number + 1 :])
                    if after not in came:
                        came[after] = state, f"{chr(65 + number)}{sign}1"  # the board names them anew
                        queue.append(after)
    raise AssertionError("no way out")


# For tasks that accept many answers and store none as theirs.
ORACLES = {
    "boxnet": boxnet,
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
    "rush_hour": rush_hour,
}
NO_TASK = {"composite"}  # mixes others


def oracle(task: str, index: int) -> str:
    item = entry(task, options(task), index)
    return ORACLES[task](item["metadata"]) if task in ORACLES else str(item["answer"])


def check(task: str, num_instances: int) -> None:
    answers = [oracle(task, index) for index in range(num_instances)]
    own = [score(task, index, answer) for index, answer in enumerate(answers)]
    assert own == [1.0] * num_instances
    others = [score(task, index, answers[index - 1]) for index in range(num_instances)]
    assert len(set(answers)) == 1 or sum(others) < num_instances, "another instance's answers score as much"
    assert max(score(task, index, "zzz") for index in range(num_instances)) < 1.0
    assert not any(score(task, index, "") == 1.0 for index, answer in enumerate(answers) if answer.strip())


@pytest.mark.parametrize("task", ["game_of_life_halting", "puzzle24", "prime_factorization", *ORACLES, *SAMPLED])
def test_oracles_score_full_and_others_less(task):
    check(task, 3)


@pytest.fixture(scope="module")
def checks(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """`check` of the tasks that are to be tested, in two processes, since it is instances that take time."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [str(item.callspec.params["task"]) for item in tests if "checks" in item.fixturenames]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        yield {task: pool.submit(check, task, NUM_INSTANCES) for task in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(DATASETS) - NO_TASK))
def test_oracles_of_every_task_score_full_and_others_less(task, checks):
    checks[task].result()

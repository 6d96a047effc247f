import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from engine.ops import gather, plan, reference

COSTS = st.lists(st.integers(0, 50), max_size=60)


def bins(result, num_ranks: int) -> np.ndarray:
    _, rank, micro = result
    return micro * num_ranks + rank


@pytest.mark.parametrize(
    ("costs", "budget", "ranks", "expected"),
    [
        # 6+3 and 4+4; the last 2 goes where 8 lies and makes it the heavier bin, which is rank 0's.
        ([6, 4, 4, 3, 2], 10, 2, (1, [1, 0, 0, 1, 0], [0, 0, 0, 0, 0])),
        # 7+3 and 5+5, on one rank one after the other.
        ([7, 5, 5, 3], 10, 1, (2, [0, 0, 0, 0], [0, 1, 1, 0])),
        # Levelled to 5+3 and 4+4 the bins have no room for the 2: the packing 5+4 and 4+3+2 stands.
        ([5, 4, 4, 3, 2], 9, 1, (2, [0, 0, 0, 0, 0], [0, 0, 1, 1, 1])),
        # One unit for three ranks: two of them get an empty micro-batch.
        ([4], 10, 3, (1, [0], [0])),
        ([], 10, 2, (1, [], [])),
    ],
)
def test_plans_worked_by_hand(costs, budget, ranks, expected):
    num_micro, rank, micro = plan(costs, costs, budget, ranks)
    assert (num_micro, rank.tolist(), micro.tolist()) == expected


def test_rounds_are_dealt_in_alternating_direction():
    # Four bins of one unit each, on two ranks: rank 0 gets 9 and 6, rank 1 gets 8 and 7.
    num_micro, rank, micro = plan([9, 8, 7, 6], [9, 8, 7, 6], 10, 2)
    assert (num_micro, rank.tolist(), micro.tolist()) == (2, [0, 1, 1, 0], [0, 0, 1, 1])


@settings(max_examples=200, deadline=None)
@given(COSTS, st.integers(50, 200), st.integers(1, 5), st.randoms(use_true_random=False))
def test_equals_the_plain_reference(costs, budget, ranks, random):
    work = [cost + 0.01 * cost**2 + random.choice([0, 0.5, 30]) for cost in costs]
    num_micro, rank, micro = plan(costs, work, budget, ranks)
    assert (num_micro, rank.tolist(), micro.tolist()) == reference.plan(costs, work, budget, ranks)


@pytest.mark.parametrize(
    ("num_units", "largest", "budget", "ranks"),
    [(800, 100, 100, 4), (3000, 1000, 4000, 400)],
    ids=["a unit finds no room", "patience runs out"],
)
def test_equals_the_plain_reference_where_the_bins_are_too_full_to_level(num_units, largest, budget, ranks):
    random = np.random.default_rng(0)
    costs = random.integers(1, largest, num_units)
    work = random.permutation(costs)
    num_micro, rank, micro = plan(costs, work, budget, ranks)
    assert (num_micro, rank.tolist(), micro.tolist()) == reference.plan(costs.tolist(), work.tolist(), budget, ranks)


def draw_lengths(name: str, num: int) -> np.ndarray:
    random = np.random.default_rng(num)
    draws = {
        "log-normal": lambda: random.lognormal(7, 1, num),
        "heavy tail": lambda: 300 * random.pareto(1.3, num) + 50,
        "uniform": lambda: random.uniform(1, 8192, num),
    }
    return draws[name]().astype(int).clip(1, 16384)


@pytest.mark.parametrize("num_units", [256, 2048, 16384])
@pytest.mark.parametrize("name", ["log-normal", "heavy tail", "uniform"])
@pytest.mark.parametrize("quadratic", [0, 1 / 12288, 1 / 1024])
def test_bins_lie_within_one_percent_of_the_lower_bound(name, num_units, quadratic):
    costs = draw_lengths(name, num_units)
    work = costs + quadratic * costs.astype(float) ** 2
    num_ranks = num_units // 16
    budget = int(2 * costs.sum() // num_ranks) + 16384  # half of it is used
    result = plan(costs, work, budget, num_ranks)
    load = np.bincount(bins(result, num_ranks), work, minlength=num_ranks)
    assert result[0] == 1
    assert load.max() <= 1.01 * max(load.mean(), work.max())


def test_sequences_into_369_parts_without_a_budget():
    costs = draw_lengths("log-normal", 4096)
    work = 24576 * costs + costs.astype(float) ** 2
    load = np.bincount(bins(plan(costs, work, int(costs.sum()), 369), 369), work)
    assert len(load) == 369
    assert load.max() <= 1.01 * max(load.mean(), work.max())


def test_ranks_stay_together_where_micro_batches_are_full():
    """96% of the budget is used, so bins cannot be levelled; but those that meet hold nearly equal work."""
    costs = draw_lengths("log-normal", 4096)
    work = costs + costs.astype(float) ** 2 / 12288
    result = plan(costs, work, 32768, 8)
    load = np.bincount(bins(result, 8), work).reshape(-1, 8)
    assert costs.sum() / 32768 > 0.96 * load.size
    assert load.max(1).sum() <= 1.01 * load.sum() / 8


@settings(max_examples=200, deadline=None)
@given(COSTS, st.integers(50, 200), st.integers(1, 5))
def test_budget_ranks_and_number_of_micro_batches(costs, budget, ranks):
    result = plan(costs, np.ones(len(costs)), budget, ranks)
    num_micro, rank, micro = result
    assert len(rank) == len(micro) == len(costs)
    assert ((0 <= rank) & (rank < ranks) & (0 <= micro) & (micro < num_micro)).all()
    assert np.bincount(bins(result, ranks), costs, minlength=1).max() <= budget
    least = -(-sum(costs) // budget)  # no packing has fewer bins
    assert num_micro <= max(1, -(-2 * least // ranks))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 8))
def test_work_is_balanced_within_the_bound_of_list_scheduling(work, ranks):
    result = plan(np.ones(len(work), int), work, len(work), ranks)  # the budget binds nothing
    assert result[0] == 1
    load = np.bincount(result[1], work, minlength=ranks)
    assert load.max() <= sum(work) / ranks + (1 - 1 / ranks) * max(work) + 1e-6


def test_ranks_that_meet_at_a_micro_batch_hold_similar_work():
    costs = np.random.default_rng(0).lognormal(5, 1, 512).astype(int).clip(1, 4096)
    num_micro, rank, micro = plan(costs, costs + costs**2 / 12288, 4096, 8)
    load = np.zeros((num_micro, 8))
    np.add.at(load, (micro, rank), costs)
    assert (load.max(1) / load.mean(1)).max() < 1.1


def test_the_same_input_gives_the_same_plan_on_every_thread():
    costs = np.random.default_rng(1).integers(1, 1000, 3000)
    expected, results = plan(costs, costs, 4000, 4), []
    threads = [threading.Thread(target=lambda: results.append(plan(costs, costs, 4000, 4))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all((a == b).all() for result in results for a, b in zip(result[1:], expected[1:], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, 11], [5, 11], 10, 1), "unit 1 costs 11 tokens: must lie between 0 and the budget of 10"),
        (([-1], [1], 10, 1), "unit 0 costs -1 tokens"),
        (([1], [1], 10, 0), "ranks = 0: must lie between 1 and 1048576"),
        (([1], [1], 10, 2**31 - 1), "ranks = 2147483647: must lie between"),
        (([1, 1], [1, -1], 10, 1), "unit 1 has work -1.0+: must be finite and not negative"),
        (([1], [float("nan")], 10, 1), "unit 0 has work -?nan"),
        (([1], [float("inf")], 10, 1), "unit 0 has work inf"),
        (([1, 2], [1], 10, 1), "2 costs but 1 works"),
    ],
)
def test_bad_input_names_the_unit(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_columns_are_gathered_run_by_run():
    columns = [np.arange(8), np.arange(8, dtype=np.float32) / 2, np.arange(8) > 3, np.arange(8, dtype=np.int16)]
    gathered = gather(columns, [5, 0, 0, 2], [0, 3, 3, 4, 6])
    assert [column.dtype for column in gathered] == [column.dtype for column in columns]
    for column, result in zip(columns, gathered, strict=True):
        assert result.tolist() == column[[5, 6, 7, 0, 2, 3]].tolist()
    assert [len(each) for each in gather(columns, [], [0])] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("columns", "starts", "bounds", "message"),
    [
        ([np.arange(8)], [6], [0, 3], "starts: run 0 does not lie within the columns"),
        ([np.arange(8)], [0, -1], [0, 3, 4], "starts: run 1 does not"),
        ([np.arange(8)], [2**63 - 1], [0, 3], "starts: run 0 does not"),
        ([np.arange(8)], [0, 0], [0, 3, 2], "bounds: fall at run 1"),
        ([np.arange(8)], [0], [1, 3], "bounds: must be one more than starts, from 0 on"),
        ([np.arange(8)], [0, 0], [0, 3], "bounds: must be one more than starts"),
        ([np.arange(8)], [], [], "bounds: must be one more than starts"),
        ([np.arange(8)], [0], [0, 2**40], "bounds: pass 2\\^31"),
        ([np.arange(8), np.arange(7)], [0], [0, 3], "columns: must be contiguous, of one dimension and one length"),
        ([np.arange(16)[::2]], [0], [0, 3], "columns: must be contiguous"),
        ([np.zeros((2, 4))], [0], [0, 3], "columns: must be contiguous"),
        ([np.zeros(8, complex)], [0], [0, 3], "columns: elements of 1, 2, 4 or 8 bytes"),
        ([np.zeros(8, object)], [0], [0, 3], "columns: objects cannot be copied"),
        ([np.arange(8)] * 17, [0], [0, 3], "columns: more than 16"),
    ],
)
def test_runs_outside_the_columns_are_refused(columns, starts, bounds, message):
    with pytest.raises(ValueError, match=message):
        gather(columns, starts, bounds)

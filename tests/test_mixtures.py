"""Mixtures of domains by hand, and what they do where answers take unequally long or are lost to filters."""

import heapq

import numpy as np
import pytest

from engine.algorithms.mixtures import adaptive, deficit, static

NONE = np.zeros(2)
HALVES = np.array([0.5, 0.5])


def test_static_is_the_weights():
    assert static(np.array([3.0, 1.0]), HALVES, HALVES, HALVES, HALVES).tolist() == [3.0, 1.0]


def test_adaptive_weighs_up_what_is_behind_its_share():
    weights = adaptive(np.array([3.0, 1.0]), np.array([50.0, 50.0]), NONE, NONE, NONE)
    np.testing.assert_allclose(weights, [0.75 * 1.5, 0.25 * 0.5])


def test_adaptive_clips_alpha_and_gives_an_unseen_domain_the_most():
    np.testing.assert_allclose(adaptive(HALVES, np.array([999.0, 1.0]), NONE, NONE, NONE)[1], 0.5 * 10)
    np.testing.assert_allclose(adaptive(HALVES, np.array([100.0, 0.0]), NONE, NONE, NONE), [0.25, 5.0])
    lopsided = adaptive(np.array([0.01, 0.99]), np.array([99.0, 1.0]), NONE, NONE, NONE)
    np.testing.assert_allclose(lopsided[0], 0.01 * 0.1)


@pytest.mark.parametrize(("rollouts", "expected"), [(49.0, 0.5), (50.0, 0.25)])
def test_adaptive_begins_at_50_rollouts(rollouts, expected):
    """Completions, not groups of them."""
    assert adaptive(HALVES, np.array([rollouts, 0.0]), NONE, NONE, NONE)[0] == expected


def test_deficit_counts_what_is_trained_and_what_of_the_rest_is_likely_to_be():
    assert deficit(HALVES, NONE, np.array([5.0, 4.0]), np.array([5.0, 4.0]), NONE).tolist() == [0.0, 1.0]
    in_flight = deficit(HALVES, NONE, np.array([5.0, 4.0]), np.array([5.0, 4.0]), np.array([0.0, 2.0]))
    assert in_flight.tolist() == [1.0, 0.0]
    lossy = deficit(HALVES, NONE, np.array([5.0, 4.0]), np.array([5.0, 49.0]), np.array([0.0, 2.0]))
    assert lossy.tolist() == [0.0, 1.0]  # of two in flight 0.2 groups are to be expected


def shares(mixture, survival, *, kept=4000, slots=64, seed=0):
    """The share of the first of two domains among kept groups; its answers take 1, the other's 10."""
    random = np.random.default_rng(seed)
    rollouts, trained, ended, in_flight = (np.zeros(2) for _ in range(4))
    running = []

    def draw(now):
        weights = mixture(HALVES, rollouts, trained, ended, in_flight)
        domain = int(random.random() * weights.sum() >= weights[0])
        in_flight[domain] += 1
        heapq.heappush(running, (now + (1, 10)[domain] * random.exponential(), domain))

    for _ in range(slots):
        draw(0.0)
    while trained.sum() < kept:
        now, domain = heapq.heappop(running)
        in_flight[domain] -= 1
        rollouts[domain] += 1
        ended[domain] += 1
        trained[domain] += random.random() < survival[domain]
        draw(now)
    return float(trained[0] / trained.sum())


def adaptive_by_kept(weights, rollouts, trained, ended, in_flight):
    """Had the rule counted what survives, it would come to shares as weight * sqrt(survival): half a correction."""
    return adaptive(weights, trained, trained, ended, in_flight)


@pytest.mark.parametrize(("mixture", "expected"), [(static, 0.62), (adaptive, 0.54)])
def test_shares_among_the_first_200_groups(mixture, expected):
    """Durations of 1 to 10 alone make a transient, of which little is left under the adaptive rule."""
    early = np.mean([shares(mixture, (1.0, 1.0), kept=200, seed=seed) for seed in range(5)])
    assert early == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("mixture", "survival", "expected"),
    [
        (static, (1.0, 1.0), 0.5),  # the long answers come late, not less often
        (adaptive, (1.0, 1.0), 0.5),
        (static, (0.9, 0.3), 0.748),
        (adaptive, (0.9, 0.3), 0.748),  # it counts what completes, and sees nothing of what is lost
        (adaptive_by_kept, (0.9, 0.3), 0.634),
        (deficit, (0.9, 0.3), 0.501),
    ],
)
def test_shares_of_trained_groups_where_durations_are_1_to_10(mixture, survival, expected):
    assert shares(mixture, survival) == pytest.approx(expected, abs=0.03)

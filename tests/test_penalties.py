"""Penalties by hand on groups of three or four completions, and their composition without torch."""

import subprocess
import sys

import numpy as np
import pytest

from engine.algorithms.penalties import compose_penalties, length, overlong, truncated_zero
from engine.config import ConfigError

SCORES = np.array([1.0, 0.0, 1.0, 0.5])
LENGTHS = np.array([60, 85, 100, 120])
TRUNCATED = np.array([False, False, False, True])
SOLVED = np.array([True, False, True, False])
GROUP = (SCORES, LENGTHS, TRUNCATED, SOLVED)


def test_overlong_grows_over_the_buffer():
    np.testing.assert_allclose(overlong(*GROUP, limit=100, buffer=20), [1.0, -0.25, 0.0, -0.5])


def test_truncated_zero():
    np.testing.assert_array_equal(truncated_zero(*GROUP), [1.0, 0.0, 1.0, 0.0])


def test_length_promotes_short_answers_only_where_they_are_right():
    lengths = np.array([10, 10, 30, 30])
    group = (SCORES, lengths, TRUNCATED, SOLVED)
    np.testing.assert_allclose(length(*group, weight=0.2), [1.1, 0.0, 0.9, 0.4])


def test_length_leaves_equal_lengths_alone():
    np.testing.assert_array_equal(length(SCORES, np.full(4, 7), TRUNCATED, SOLVED, weight=1.0), SCORES)


def test_penalties_apply_in_order_and_leave_their_input():
    penalise = compose_penalties([{"name": "truncated_zero"}, {"name": "overlong", "limit": 100, "buffer": 20}])
    np.testing.assert_allclose(penalise(*GROUP), [1.0, -0.25, 0.0, -1.0])
    np.testing.assert_array_equal(SCORES, [1.0, 0.0, 1.0, 0.5])


def test_no_penalties():
    np.testing.assert_array_equal(compose_penalties([])(*GROUP), SCORES)


def test_a_mistake_names_its_place_in_the_list():
    with pytest.raises(ConfigError, match=r"^algorithm\.penalties\.1\.buffer: overlong needs it$"):
        compose_penalties([{"name": "truncated_zero"}, {"name": "overlong", "limit": 100}])


def test_the_coordinator_gets_penalties_without_torch():
    code = "import engine.algorithms.penalties, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

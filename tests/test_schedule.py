"""Schedules: what holds at which step, and mistakes."""

import learning
import pytest

from engine.config import ConfigError
from engine.schedule import Schedule

ENTRIES = (
    "schedule=[{ step = 3, generator = { temperature = 0.5 }, run = { group_size = 8 } }, "
    "{ step = 5, generator = { max_new_tokens = 12 }, algorithm = { penalties = [{ name = 'truncated_zero' }] } }]"
)


def test_each_entry_is_laid_over_those_before_it():
    schedule = Schedule(learning.configure(ENTRIES))
    seen = [schedule.at(version) for version in (0, 2, 3, 4, 5, 99)]
    assert [config.generator.temperature for config in seen] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert [config.run.group_size for config in seen] == [4, 4, 8, 8, 8, 8]
    assert [config.generator.max_new_tokens for config in seen] == [8, 8, 8, 8, 12, 12]
    assert [len(config.algorithm.penalties) for config in seen] == [0, 0, 0, 0, 1, 1]
    assert (schedule.longest_answer, schedule.changes_temperature) == (12, True)


def test_without_entries_the_configuration_holds():
    config = learning.configure()
    assert Schedule(config).at(7) is config


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ("[{ step = 0, run = { group_size = 2 } }]", "schedule.0.step = 0: must be a number of steps above 0"),
        ("[{ step = 4 }, { step = 4 }]", "schedule.1.step = 4: must be a number of steps above 4"),
        ("[{ run = { group_size = 2 } }]", "schedule.0.step = None: must be"),
        ("[{ step = 1, learner = { lr = 1.0 } }]", "schedule.0.learner.lr: may not change in a run; allowed are step,"),
        ("[{ step = 1, run = { group_size = 0 } }]", "schedule.0: run.group_size = 0: Expected `int` >= 1"),
        ("[{ step = 1, generator = { max_new_tokens = 32 } }]", "schedule.0: generator.max_new_tokens = 32: leaves no"),
    ],
)
def test_a_mistake_names_the_entry(entries, line):
    with pytest.raises(ConfigError) as error:
        Schedule(learning.configure(f"schedule={entries}"))
    assert str(error.value).replace("'", "`").startswith(line.replace("'", "`"))

"""What changes in the middle of a run: [[schedule]] tables, each laid over the configuration from its step on.

    [[schedule]]
    step = 200
    run = { group_size = 16 }
    generator = { temperature = 0.8, max_new_tokens = 4096 }

A group belongs to the entry of the version that it was leased at, wherever it is judged or trained.
"""

import bisect
from typing import Any

import msgspec

from engine.config import Config, ConfigError, merge, parse

FIELDS = (
    "run.group_size",
    "generator.temperature",
    "generator.max_new_tokens",
    "algorithm.penalties",
    "algorithm.filter_uniform",
    "algorithm.overlong_filter",
)


class Schedule:
    """The configuration by step. Raises `ConfigError` for a field that may not change, or entries out of order."""

    def __init__(self, config: Config):
        self._steps = [0]
        self.configs = [config]
        for number, entry in enumerate(config.schedule):
            field = f"schedule.{number}"
            step = entry.get("step")
            if not isinstance(step, int) or step <= self._steps[-1]:
                raise ConfigError(f"{field}.step = {step!r}: must be a number of steps above {self._steps[-1]}")
            changes = {name: table for name, table in entry.items() if name != "step"}
            self._check(field, changes)
            self._steps.append(step)
            self.configs.append(_laid(field, self.configs[-1], changes))

    def at(self, version: int) -> Config:
        return self.configs[self.entry(version)]

    def entry(self, version: int) -> int:
        """The place in `configs` of what holds at `version`."""
        return bisect.bisect_right(self._steps, version) - 1

    @property
    def longest_answer(self) -> int:
        return max(config.generator.max_new_tokens for config in self.configs)

    @property
    def changes_temperature(self) -> bool:
        return len({config.generator.temperature for config in self.configs}) > 1

    @staticmethod
    def _check(field: str, changes: dict[str, Any]) -> None:
        for table, values in changes.items():
            for key in values if isinstance(values, dict) else [""]:
                name = f"{table}.{key}".rstrip(".")
                if name not in FIELDS:
                    raise ConfigError(f"{field}.{name}: may not change in a run; allowed are step, {', '.join(FIELDS)}")


def _laid(field: str, config: Config, changes: dict[str, Any]) -> Config:
    try:
        return parse(merge(msgspec.to_builtins(config), changes))
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error

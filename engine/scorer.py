"""The rewards of a job's domains, in a pool of processes."""

from collections.abc import Hashable

from engine.config import Config, ConfigError
from engine.schema import Prompt
from rewards.pool import Limits, Pool
from rewards.table import resolve
from rewards.worker import Task


def check_rewards(config: Config) -> None:
    """Raises `ConfigError` for a reward that is unknown or refuses its options."""
    for number, domain in enumerate(config.domains):
        try:
            resolve(domain.reward, domain.reward_options)
        except ValueError as error:
            raise ConfigError(f"domains.{number}.reward = {domain.reward!r}: {error}") from error


class Scorer:
    """Takes groups, gives verdicts; owned by one thread, which calls `poll` at least as often as deadlines matter.

    `fileno()` is readable when there is something to poll.
    """

    def __init__(self, config: Config):
        rewards = {domain.name: (domain.reward, domain.reward_options) for domain in config.domains}
        deadlines, memory_gb = config.deadlines, config.generator.reward_memory_gb
        limits = Limits(deadlines.start_s, deadlines.reward_s, deadlines.judge_s, memory_gb)
        self.pool = Pool(rewards, config.generator.reward_workers, limits)
        self.fileno, self.poll, self.close = self.pool.fileno, self.pool.poll, self.pool.close

    def submit(self, key: Hashable, prompt: Prompt, completions: list[str]) -> None:
        """`completions` of `prompt` are to be judged; `poll` gives the verdicts back under `key`."""
        self.pool.submit(key, Task(prompt.domain, prompt.text, prompt.answer, prompt.fields, completions))

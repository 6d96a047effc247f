"""The rewards of a job's domains, in a pool of processes."""

from collections.abc import Hashable
from typing import TYPE_CHECKING

from engine.config import Config, ConfigError
from engine.schema import Prompt
from rewards.options import Misfit
from rewards.pool import Limits, Pool
from rewards.table import TABLE, Reward, resolve, waits
from rewards.terms import parts
from rewards.worker import Task, judge

if TYPE_CHECKING:
    from engine.prompts import Prompts

PROBED = 8  # prompts of a domain whose columns are tried at launch
PROBE = "```text\nleeway\n```"  # a completion that is nothing, and no program


def check_rewards(config: Config) -> list[Reward]:
    """The domains' rewards. Raises `ConfigError` for one that is unknown or refuses its options."""
    rewards = []
    for number, domain in enumerate(config.domains):
        field = f"domains.{number}.reward"
        try:
            rewards.append(resolve(domain.reward, domain.reward_options))
        except Misfit as error:
            raise ConfigError(f"{field}_options.{error}") from error
        except ValueError as error:
            raise ConfigError(f"{field} = {domain.reward!r}: {error}") from error
        for name, options in parts(domain.reward, domain.reward_options):
            part = rewards[-1] if name == domain.reward else resolve(name, options)
            total_s, deadline_s = getattr(part, "total_s", 0.0), config.deadlines.reward_s
            if total_s >= deadline_s:
                allowed = f"must be below deadlines.reward_s = {deadline_s:g}"
                raise ConfigError(f"{field}_options: total_s = {total_s:g} of {name!r}: {allowed}")
    return rewards


def check_judgeable(config: Config, rewards: list[Reward], prompts: "Prompts") -> None:
    """Raises `ConfigError` for a domain whose reward can judge none of its first prompts: columns of another form, say.
    A user's own reward, and one that waits, is not tried."""
    for number, (domain, reward) in enumerate(zip(config.domains, rewards, strict=True)):
        own = [name for name, _ in parts(domain.reward, domain.reward_options) if name not in TABLE]
        if own or waits(reward):
            continue
        first = [prompts.prompt(domain.name, index) for index in range(PROBED)]
        verdicts = [judge(reward, task_of(prompt, [PROBE]), PROBE) for prompt in first]
        if all(verdict.error for verdict in verdicts):
            raise ConfigError(f"domains.{number}.reward = {domain.reward!r}: can judge no prompt: {verdicts[0].error}")


def task_of(prompt: Prompt, completions: list[str]) -> Task:
    """`completions` of `prompt`, to be judged."""
    return Task(prompt.domain, prompt.text, prompt.answer, prompt.fields, completions)


class Scorer:
    """Takes groups, gives verdicts; owned by one thread, which calls `poll` at least as often as deadlines matter.

    `fileno()` is readable when there is something to poll.
    """

    def __init__(self, config: Config):
        rewards = {domain.name: (domain.reward, domain.reward_options) for domain in config.domains}
        deadlines, memory_gb = config.deadlines, config.generator.reward_memory_gb
        limits = Limits(deadlines.start_s, deadlines.reward_s, deadlines.judge_s, memory_gb)
        pool = self.pool = Pool(rewards, config.generator.reward_workers, limits)
        self.fileno, self.poll, self.cancel, self.close = pool.fileno, pool.poll, pool.cancel, pool.close

    def submit(self, key: Hashable, prompt: Prompt, completions: list[str]) -> None:
        """`completions` of `prompt` are to be judged; `poll` gives the verdicts back under `key`."""
        self.pool.submit(key, task_of(prompt, completions))

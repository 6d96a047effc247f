"""The rewards of a job's domains, in a pool of processes."""

from collections.abc import Hashable
from contextlib import closing
from itertools import product
from typing import TYPE_CHECKING

from engine.config import Config, ConfigError
from engine.schema import Prompt
from rewards.options import Misfit
from rewards.pool import Limits, Pool
from rewards.table import TABLE, Reward, resolve, waits
from rewards.terms import parts
from rewards.verdict import Verdict
from rewards.worker import Task

if TYPE_CHECKING:
    from engine.prompts import Prompts

PROBED = 4  # prompts of a domain that its reward is tried on at launch
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


def check_judgeable(config: Config, rewards: list[Reward], prompts: "Prompts") -> list[str]:
    """Tries each reward on the first prompts of its domain. Raises `ConfigError` where one of `rewards.TABLE` can judge
    none: columns of another form, say. Of a user's own, and of one that waits, it says so in a line: those may have
    their reasons, and what they do with real completions the parity check will tell."""
    with closing(_pool(config)) as pool:  # where a column can neither hang nor fell this process
        for domain, index in product(config.domains, range(PROBED)):
            pool.submit(domain.name, _task(prompts.prompt(domain.name, index), [PROBE]))
        judged: list[tuple[Hashable, list[Verdict]]] = []
        while len(judged) < PROBED * len(config.domains):
            judged += pool.poll(1.0)
    doubts = []
    for number, (domain, reward) in enumerate(zip(config.domains, rewards, strict=True)):
        errors = [verdict.error for key, [verdict] in judged if key == domain.name]
        if not all(errors):
            continue
        line = f"domains.{number}.reward = {domain.reward!r}: can judge no prompt: {errors[0]}"
        if not waits(reward) and all(name in TABLE for name, _ in parts(domain.reward, domain.reward_options)):
            raise ConfigError(line)
        doubts.append(line)
    return doubts


def _task(prompt: Prompt, completions: list[str]) -> Task:
    """`completions` of `prompt`, to be judged."""
    return Task(prompt.domain, prompt.text, prompt.answer, prompt.fields, completions)


def _pool(config: Config) -> Pool:
    rewards = {domain.name: (domain.reward, domain.reward_options) for domain in config.domains}
    deadlines = config.deadlines
    limits = Limits(deadlines.start_s, deadlines.reward_s, deadlines.judge_s, config.generator.reward_memory_gb)
    return Pool(rewards, config.generator.reward_workers, limits)


class Scorer:
    """Takes groups, gives verdicts; owned by one thread, which calls `poll` at least as often as deadlines matter.

    `fileno()` is readable when there is something to poll.
    """

    def __init__(self, config: Config):
        pool = self.pool = _pool(config)
        self.fileno, self.poll, self.cancel, self.close = pool.fileno, pool.poll, pool.cancel, pool.close

    def submit(self, key: Hashable, prompt: Prompt, completions: list[str]) -> None:
        """`completions` of `prompt` are to be judged; `poll` gives the verdicts back under `key`."""
        self.pool.submit(key, _task(prompt, completions))

"""The loop in one process, one thing after the other: sample with weights of `lag` versions ago, score, train.

What staleness does to a method is so told apart from what asynchrony does to time. Same seed, same numbers.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine import stages
from engine import tokenizer as tokenizers
from engine.algorithms.method import compose
from engine.buffer import early_end
from engine.config import Config
from engine.generators.base import Sampled
from engine.generators.table import GENERATORS
from engine.learner import Learner
from engine.learner_loop import prepare
from engine.model import build, describe
from engine.process import StopSignal
from engine.prompts import Prompts
from engine.schedule import Schedule
from engine.schema import Group, Lease, Prompt
from engine.scores import scheduled_shape
from engine.tally import Tally
from engine.task import samplings
from engine.warm_start import warm_start
from rewards.table import Reward, resolve
from rewards.verdict import Verdict

ROUNDS = 3  # of sampling in a step, beyond which uniform groups are trained on rather than replaced


def steps(config: Config, lag: int = 0) -> Iterator[dict[str, Any]]:
    """The figures of every step, stage after stage, each from the policy of the one before."""
    policy = None
    for stage in stages.configs(config):
        loop = Loop(msgspec.structs.replace(stage, model=config.model), lag, policy)
        yield from loop.steps()
        policy = loop.policy


class Loop:
    """One run of `config`; every step trains on groups sampled by the weights of `lag` versions before."""

    def __init__(self, config: Config, lag: int = 0, policy: PreTrainedModel | None = None):
        self._config, self._schedule = config, Schedule(config)
        self._tokenizer = tokenizers.load(config.model)
        self._prompts, self._tally = Prompts(config, self._tokenizer), Tally()
        self.policy = start(config, self._tokenizer) if policy is None else policy
        files = {**tokenizers.files(self._tokenizer), **describe(self.policy)}
        self._generator = GENERATORS["embedded"](config, files, self._tokenizer)
        self._method, self._shape = compose(config.algorithm), scheduled_shape(config)
        self._rewards = {each.name: resolve(each.reward, each.reward_options) for each in config.domains}
        self._learner = Learner(config, self.policy, self._method, device="cpu", directory=Path("unused"))
        self._past: deque[tuple[int, dict[str, torch.Tensor]]] = deque(maxlen=lag + 1)
        self._num_drawn = 0

    def steps(self) -> Iterator[dict[str, Any]]:
        """The figures of every step; `explained_variance` is that of the Monte-Carlo returns, whatever the targets."""
        for version in range(self._config.run.steps):
            self._past.append((version, {name: tensor.clone() for name, tensor in self._learner.weights()}))
            self._generator.load(*self._past[0])
            groups, kept = self._sample(self._schedule.at(version))
            updates = prepare(self._schedule, self._method, self._shape, kept, version)
            critic = self._learner.critic
            values = {} if critic is None else critic.appraise(updates, alone=True)[2]
            yield self._learner.step(updates) | values | figures(groups)

    def _sample(self, config: Config) -> tuple[list[Group], list[Group]]:
        """All groups sampled for a step, and those of them to train on."""
        wanted, sampled, kept = config.run.groups_per_step, [], []
        for _ in range(ROUNDS):
            fresh = self._round(config, wanted - len(kept))
            sampled += fresh
            kept += [group for group in fresh if self._is_kept(config, group)]
            if len(kept) == wanted:
                return sampled, kept
        return sampled, (kept + sampled)[:wanted]

    def _round(self, config: Config, num_groups: int) -> list[Group]:
        sampling, num_samples = samplings(config)["train"]
        version, groups = self._generator.version, []
        for _ in range(num_groups):
            prompt = self._prompts.prompt(*self._prompts.draw(self._tally))
            lease = Lease("train", self._num_drawn, 0, version, config.run.seed, num_samples, prompt, sampling)
            self._generator.submit(lease)
            self._tally.drawn(prompt.domain)
            self._num_drawn += 1
        while len(groups) < num_groups:
            groups += [self._scored(sampled) for sampled in self._generator.poll(0.0)]
        return sorted(groups, key=lambda group: group.group_id)

    def _is_kept(self, config: Config, group: Group) -> bool:
        end, _ = early_end(group, self._shape if config.algorithm.filter_uniform else None)
        self._tally.arrived(group.domain, group.num_samples)
        self._tally.end(group.domain, "trained" if end is None else end)
        return end is None

    def _scored(self, sampled: Sampled) -> Group:
        lease, ends = sampled.lease, np.cumsum(sampled.lengths)
        answers = np.split(sampled.token_ids, ends[:-1])
        texts = [tokenizers.decode(self._tokenizer, answer) for answer in answers]
        verdicts = [judged(self._rewards[lease.prompt.domain], lease.prompt, text) for text in texts]
        parts = [[segment.end for segment in verdict.segments] for verdict in verdicts]
        pairs = zip(answers, parts, strict=True)
        facts = {name: getattr(sampled, name) for name in ("lengths", "finish", "token_ids", "logprobs", "versions")}
        return Group(
            kind="train",
            group_id=lease.group_id,
            attempt=0,
            incarnation=0,
            generator="loop",
            domain=lease.prompt.domain,
            lease_version=lease.version,
            temperature=lease.sampling.temperature,
            prompt_ids=lease.prompt.token_ids,
            verdicts=verdicts,
            loss_mask=np.ones(len(sampled.token_ids), np.uint8),
            segment_ends=[tokenizers.token_ends(self._tokenizer, *pair) for pair in pairs] if any(parts) else [],
            **facts,
        )


def judged(reward: Reward, prompt: Prompt, text: str) -> Verdict:
    return Verdict.of(reward(prompt.text, text, prompt.answer, **prompt.fields))


def figures(groups: list[Group]) -> dict[str, float]:
    """Means over the completions of a step, as sampled, of all domains and of each; tokens generated."""
    found = {"tokens": float(sum(len(group.token_ids) for group in groups))}
    for name in ("", *{group.domain for group in groups}):
        mine = [group for group in groups if name in ("", group.domain)]
        verdicts, place = [verdict for group in mine for verdict in group.verdicts], f"/{name}" if name else ""
        found[f"reward{place}"] = float(np.mean([verdict.score for verdict in verdicts]))
        found[f"accuracy{place}"] = float(np.mean([verdict.solved for verdict in verdicts]))
        found[f"length{place}"] = float(np.mean([length for group in mine for length in group.lengths]))
    return found


def start(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that training begins with."""
    policy = build(config.model, seed=config.run.seed, **tokenizers.vocabulary(tokenizer))
    if config.warm_start.steps:
        warm_start(config, policy, tokenizer, StopSignal(config.deadlines.stop_s), lambda text: None)
    return policy

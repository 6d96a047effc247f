"""The loop in one process, one thing after the other: sample with weights of `lag` versions ago, score, train.

What staleness does to a method is so told apart from what asynchrony does to time. Same seed, same numbers.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine import tokenizer as tokenizers
from engine.algorithms.method import compose
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
from engine.task import samplings
from engine.warm_start import warm_start
from rewards.table import Reward, resolve
from rewards.verdict import Verdict


class Loop:
    """One run of `config`; every step trains on groups sampled by the weights of `lag` versions before."""

    def __init__(self, config: Config, lag: int = 0):
        self._config, self._schedule = config, Schedule(config)
        self._tokenizer = tokenizers.load(config.model)
        self._prompts = Prompts(config, self._tokenizer)
        policy = start(config, self._tokenizer)
        files = {**tokenizers.files(self._tokenizer), **describe(policy)}
        self._generator = GENERATORS["embedded"](config, files, self._tokenizer)
        self._method, self._shape = compose(config.algorithm), scheduled_shape(config)
        self._rewards = {each.name: resolve(each.reward, each.reward_options) for each in config.domains}
        self._learner = Learner(config, policy, self._method, device="cpu", directory=Path("unused"))
        self._past: deque[tuple[int, dict[str, torch.Tensor]]] = deque(maxlen=lag + 1)
        self._num_drawn = 0

    def steps(self) -> Iterator[dict[str, Any]]:
        """The figures of every step."""
        for version in range(self._config.run.steps):
            self._past.append((version, {name: tensor.clone() for name, tensor in self._learner.weights()}))
            self._generator.load(*self._past[0])
            groups = self._sample(self._schedule.at(version))
            report = self._learner.step(prepare(self._schedule, self._method, self._shape, groups, version))
            verdicts = [verdict for group in groups for verdict in group.verdicts]
            yield {
                **report,
                "reward": float(np.mean([verdict.score for verdict in verdicts])),
                "accuracy": float(np.mean([verdict.solved for verdict in verdicts])),
                "length": float(np.mean([length for group in groups for length in group.lengths])),
            }

    def _sample(self, config: Config) -> list[Group]:
        sampling, num_samples = samplings(config)["train"]
        version, groups = self._generator.version, []
        for _ in range(config.run.groups_per_step):
            prompt = self._prompts.prompt(*self._prompts.draw())
            lease = Lease("train", self._num_drawn, 0, version, config.run.seed, num_samples, prompt, sampling)
            self._generator.submit(lease)
            self._num_drawn += 1
        while len(groups) < config.run.groups_per_step:
            groups += [self._scored(sampled) for sampled in self._generator.poll(0.0)]
        return sorted(groups, key=lambda group: group.group_id)

    def _scored(self, sampled: Sampled) -> Group:
        lease, ends = sampled.lease, np.cumsum(sampled.lengths)
        texts = [
            tokenizers.decode(self._tokenizer, sampled.token_ids[end - length : end])
            for end, length in zip(ends, sampled.lengths, strict=True)
        ]
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
            verdicts=[judged(self._rewards[lease.prompt.domain], lease.prompt, text) for text in texts],
            loss_mask=np.ones(len(sampled.token_ids), np.uint8),
            **facts,
        )


def judged(reward: Reward, prompt: Prompt, text: str) -> Verdict:
    return Verdict.of(reward(prompt.text, text, prompt.answer, **prompt.fields))


def start(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that training begins with."""
    policy = build(config.model, seed=config.run.seed, **tokenizers.vocabulary(tokenizer))
    if config.warm_start.steps:
        warm_start(config, policy, tokenizer, StopSignal(config.deadlines.stop_s), lambda text: None)
    return policy

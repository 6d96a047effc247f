"""The plain synchronous algorithm: sample, score, train, load; one after the other in one process.

The reference for `max_staleness = 0`: nothing here knows of tickets, buffer, stream, coordinator or the loops.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine import tokenizer as tokenizers
from engine.algorithms.method import compose
from engine.config import Config
from engine.credit import advantages
from engine.generators.base import Sampled
from engine.generators.table import GENERATORS
from engine.learner import Learner
from engine.model import build, describe
from engine.packer import pack
from engine.process import StopSignal
from engine.prompts import Prompts
from engine.schema import Group, Lease, Prompt, Sampling
from engine.scores import shape_by, truncated
from engine.warm_start import warm_start
from rewards.table import Reward, resolve
from rewards.verdict import Verdict


def train(config: Config, directory: Path) -> dict[str, torch.Tensor]:
    """The weights after `run.steps` steps, by name."""
    tokenizer = tokenizers.load(config.model)
    prompts = Prompts(config, tokenizer)
    model = policy(config)
    files = {**tokenizers.files(tokenizer), **describe(model)}
    generator = GENERATORS[config.generator.engine](config, files, tokenizer)
    method, shape = compose(config.algorithm), shape_by(config.algorithm)
    rewards = {domain.name: resolve(domain.reward, domain.reward_options) for domain in config.domains}
    learner = Learner(config, model, method, device="cpu", directory=directory)
    number = 0
    for version in range(config.run.steps):
        generator.load(version, {name: tensor.clone() for name, tensor in learner.weights()})
        leases = []
        for _ in range(config.run.groups_per_step):
            prompt = prompts.prompt(*prompts.draw())
            leases.append(lease(config, number, version, prompt))
            generator.submit(leases[-1])
            number += 1
        groups = {}
        while len(groups) < len(leases):
            for sampled in generator.poll(0.0):
                groups[sampled.lease.group_id] = scored(sampled, tokenizer, rewards)
        ordered = [groups[lease.group_id] for lease in leases]
        learner.step(
            pack(
                ordered,
                advantages(method, shape, ordered),
                version=version,
                max_staleness=0,
                num_ranks=1,
                budget=config.learner.tokens_per_micro_batch,
                share_prefix=config.learner.share_prefix,
                num_updates=config.learner.updates_per_step,
                left_out=[truncated(group) for group in ordered] if config.algorithm.overlong_filter else None,
            )
        )
    return {name: tensor.clone() for name, tensor in learner.weights()}


def policy(config: Config) -> PreTrainedModel:
    """The model that training begins with."""
    tokenizer = tokenizers.load(config.model)
    model = build(config.model, seed=config.run.seed, **tokenizers.vocabulary(tokenizer))
    if config.warm_start.steps:
        warm_start(config, model, tokenizer, StopSignal(config.deadlines.stop_s), [].append)
    return model


def lease(config: Config, number: int, version: int, prompt: Prompt) -> Lease:
    settings = config.generator
    sampling = Sampling(settings.temperature, settings.max_new_tokens, stop=tuple(settings.stop))
    return Lease("train", number, 0, version, config.run.seed, config.run.group_size, prompt, sampling)


def scored(sampled: Sampled, tokenizer: PreTrainedTokenizerBase, rewards: dict[str, Reward]) -> Group:
    """Judged here and now, without the reward's worker processes."""
    prompt, ends = sampled.lease.prompt, np.cumsum(sampled.lengths)
    texts = [
        tokenizers.decode(tokenizer, sampled.token_ids[end - length : end])
        for end, length in zip(ends, sampled.lengths, strict=True)
    ]
    reward = rewards[prompt.domain]
    fields = {name: getattr(sampled, name) for name in ("lengths", "finish", "token_ids", "logprobs", "versions")}
    return Group(
        kind="train",
        group_id=sampled.lease.group_id,
        attempt=0,
        incarnation=0,
        generator="reference",
        domain=prompt.domain,
        lease_version=sampled.lease.version,
        temperature=sampled.lease.sampling.temperature,
        prompt_ids=prompt.token_ids,
        verdicts=[Verdict.of(reward(prompt.text, text, prompt.answer, **prompt.fields)) for text in texts],
        loss_mask=np.ones(len(sampled.token_ids), np.uint8),
        **fields,
    )

"""The best synchronous placement of the same parts: every process generates its share, then all train together.

    torchrun --nproc-per-node 2 -m bench.synchronous CONFIG

Each core is used in both phases: generation is split by groups, training by micro-batches over an FSDP2 mesh. What is
lost is the wait for the longest completion of each step, and that is what asynchrony is measured against. Prints one
JSON line.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils import logging

from engine import tokenizer as tokenizers
from engine.algorithms.method import compose
from engine.config import Config, load
from engine.credit import advantages
from engine.generators.base import Sampled
from engine.generators.table import GENERATORS
from engine.learner import Learner
from engine.model import build, describe
from engine.packer import pack
from engine.prompts import Prompts
from engine.schema import Group, Lease, Sampling
from engine.scores import shape_by
from rewards.table import resolve
from rewards.verdict import Verdict

WARM_UP = 2


class Synchronous:
    """One process of the synchronous algorithm."""

    def __init__(self, config: Config):
        self.config, self.rank, self.size = config, dist.get_rank(), dist.get_world_size()
        self.tokenizer = tokenizers.load(config.model)
        self.prompts = Prompts(config, self.tokenizer)
        policy = build(config.model, seed=config.run.seed, **tokenizers.vocabulary(self.tokenizer))
        files = {**tokenizers.files(self.tokenizer), **describe(policy)}
        self.generator = GENERATORS["embedded"](config, files, self.tokenizer)
        self.method, self.shape = compose(config.algorithm), shape_by(config.algorithm)
        self.learner = Learner(config, policy, self.method, device="cpu", directory=Path("unused"))
        self.rewards = {d.name: resolve(d.reward, d.reward_options) for d in config.domains}
        self.waited_s = 0.0
        self.tokens = 0

    def step(self, version: int) -> None:
        config = self.config
        self.generator.load(version, {name: tensor.clone() for name, tensor in self.learner.weights()})
        first = version * config.run.groups_per_step
        leases = [self.lease(first + number, version) for number in range(config.run.groups_per_step)]
        mine = [self.score(sampled) for sampled in self.generate(leases[self.rank :: self.size])]
        waiting = time.perf_counter()
        dist.barrier()
        self.waited_s += time.perf_counter() - waiting
        everyone: list[list[Group]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, mine)
        groups = sorted((group for part in everyone for group in part), key=lambda group: group.group_id)
        updates = pack(
            groups,
            advantages(self.method, self.shape, groups),
            version=version,
            max_staleness=0,
            num_ranks=self.size,
            budget=config.learner.tokens_per_micro_batch,
            share_prefix=config.learner.share_prefix,
            num_updates=config.learner.updates_per_step,
        )
        self.learner.step(updates)
        self.tokens += sum(update.num_tokens for update in updates)

    def lease(self, number: int, version: int) -> Lease:
        settings = self.config.generator
        sampling = Sampling(settings.temperature, settings.max_new_tokens)
        prompt = self.prompts.prompt(*self.prompts.draw())
        run = self.config.run
        return Lease("train", number, 0, version, run.seed, run.group_size, prompt, sampling)

    def generate(self, leases: list[Lease]) -> list[Sampled]:
        for lease in leases:
            self.generator.submit(lease)
        finished: list[Sampled] = []
        while len(finished) < len(leases):
            finished += self.generator.poll(0.0)
        return finished

    def score(self, sampled: Sampled) -> Group:
        lease, ends = sampled.lease, np.cumsum(sampled.lengths)
        prompt, reward = lease.prompt, self.rewards[lease.prompt.domain]
        texts = [
            tokenizers.decode(self.tokenizer, sampled.token_ids[end - length : end])
            for end, length in zip(ends, sampled.lengths, strict=True)
        ]
        return Group(
            kind="train",
            group_id=lease.group_id,
            attempt=0,
            incarnation=0,
            generator=str(self.rank),
            domain=prompt.domain,
            lease_version=lease.version,
            temperature=lease.sampling.temperature,
            prompt_ids=prompt.token_ids,
            lengths=sampled.lengths,
            finish=sampled.finish,
            verdicts=[Verdict.of(reward(prompt.text, text, prompt.answer, **prompt.fields)) for text in texts],
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            versions=sampled.versions,
            loss_mask=np.ones(len(sampled.token_ids), np.uint8),
        )


def main() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    config = load(sys.argv[1])
    dist.init_process_group("gloo")
    job = Synchronous(config)
    for version in range(config.run.steps):
        if version == WARM_UP:
            started, used, job.waited_s, job.tokens = time.perf_counter(), sum(os.times()[:4]), 0.0, 0
        job.step(version)
    wall_s, cpu_s = time.perf_counter() - started, sum(os.times()[:4]) - used
    totals = torch.tensor([cpu_s, job.waited_s], dtype=torch.float64)
    dist.all_reduce(totals)
    if job.rank == 0:
        figures = {"trained_tokens": job.tokens, "wall_s": wall_s, "cpu_s": float(totals[0])}
        figures |= {"tokens_per_s": job.tokens / wall_s, "tokens_per_cpu_s": job.tokens / float(totals[0])}
        print(json.dumps(figures | {"idle": float(totals[1]) / job.size / wall_s}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

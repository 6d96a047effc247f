"""A group on its way to a generator and back."""

import math

import msgspec
import numpy as np

from engine.config import Config, Generator
from engine.schema import Group, Kind, Lease, LeaseKey, Prompt, Sampling

GAIN, SWING = 0.2, 2.0  # of the temperature that follows the entropy


class Task(msgspec.Struct):
    """A group that is leased or waits for a lease; `generator`, `version` and `leased_s` are those of its present
    lease, and so are the sampling and the number of samples of a training group."""

    kind: Kind
    group_id: int
    prompt: Prompt
    sampling: Sampling | None = None
    num_samples: int = 0
    survey: int = -1  # the evaluation or probe that it belongs to
    attempt: int = 0
    failures: int = 0
    generator: str = ""
    version: int = -1
    leased_s: float = 0.0

    @property
    def key(self) -> tuple[Kind, int]:
        return self.kind, self.group_id

    @property
    def lease_key(self) -> LeaseKey:
        return self.kind, self.group_id, self.attempt

    def lease(self, seed: int) -> Lease:
        assert self.sampling is not None, "a lease of nothing to sample"
        return Lease(
            kind=self.kind,
            group_id=self.group_id,
            attempt=self.attempt,
            version=self.version,
            seed=seed,
            num_samples=self.num_samples,
            prompt=self.prompt,
            sampling=self.sampling,
        )

    def defect(self, group: Group, newest_version: int) -> str:
        """What is wrong with `group` as the result of this task; empty where nothing is."""
        samples = {len(group.lengths), len(group.finish), len(group.verdicts)}
        tokens = {len(array) for array in (group.token_ids, group.logprobs, group.versions, group.loss_mask)}
        if samples != {self.num_samples}:
            return f"{sorted(samples)} samples instead of {self.num_samples}"
        if tokens != {sum(group.lengths)}:
            return f"{sorted(tokens)} tokens instead of {sum(group.lengths)}"
        if not np.isfinite(group.logprobs).all():
            return "a log-probability is infinite or not a number"
        segments = [len(verdict.segments) for verdict in group.verdicts]
        if any(segments) and segments != [len(ends) for ends in group.segment_ends]:
            return f"{segments} judged segments, ends of {[len(ends) for ends in group.segment_ends]}"
        if len(group.versions) and not self.version <= group.versions.min() <= group.versions.max() <= newest_version:
            span = f"{group.versions.min()} to {group.versions.max()}"
            return f"tokens of versions {span}, leased at {self.version} with {newest_version} published"
        return ""


def followed(generator: Generator, temperature: float | None, entropy: float | None) -> float | None:
    """The temperature after a step whose tokens had `entropy` at `temperature`; None: the configured one.

    T * exp(GAIN * (target - entropy)), between 1 / SWING and SWING times what it began as: where the policy sharpens,
    it is sampled hotter. The target of about 0.3 nats: AceReason-Nemotron 1.1, arXiv:2506.13284; the rule is ours.
    """
    if generator.target_entropy == 0 or entropy is None or not math.isfinite(entropy):
        return temperature
    start = generator.temperature
    warmer = (start if temperature is None else temperature) * math.exp(GAIN * (generator.target_entropy - entropy))
    return min(max(warmer, start / SWING), start * SWING)


def samplings(config: Config) -> dict[Kind, tuple[Sampling, int]]:
    """How a task of each kind is sampled, and how often; a probe is sampled as training is."""
    generator, evaluation = config.generator, config.evaluation
    stop, longest = tuple(generator.stop), generator.max_new_tokens
    training = Sampling(generator.temperature, longest, stop=stop), config.run.group_size
    truncated = Sampling(evaluation.temperature, longest, evaluation.top_p, evaluation.top_k, stop)
    return {"train": training, "probe": training, "eval": (truncated, evaluation.samples)}

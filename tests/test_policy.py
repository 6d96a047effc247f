"""The policies beside the trained one, and what is asked of the head."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch
from torch import Tensor

from engine.algorithms.method import Method, compose
from engine.learner import Learner
from engine.model import build
from engine.packer import Update
from engine.policy import Batch, Policy


class Recorder:
    """A method that keeps what the learner tells it of the other policies."""

    def __init__(self, method: Method):
        self._method = method
        self.seen: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def loss(self, logprob: Tensor, entropy: Tensor, tokens: Any, **counts: int) -> Any:
        self.seen.append((logprob.detach(), tokens))
        return self._method.loss(logprob, entropy, tokens, **counts)


def recorded(directory: Path, *overrides: str) -> tuple[Learner, list[Any], list[Update]]:
    config = learning.configure("learner.tokens_per_micro_batch=4096", "ops.backend='reference'", *overrides)
    method = Recorder(compose(config.algorithm))
    learner = learning.learner(config, directory, method)  # type: ignore[arg-type]
    updates = learning.take(config, learning.groups(4))
    learner.step(updates)
    return learner, method.seen, updates


def test_proximal_policy_is_that_of_the_start_of_the_step(tmp_path: Path) -> None:
    _, seen, _ = recorded(tmp_path, "learner.updates_per_step=2", "algorithm.correction.name='decoupled'")
    start = learning.learner(learning.configure(), tmp_path).model
    (_, first), (now, second) = seen
    expected = torch.cat([score for group in learning.groups(4)[2:] for score in learning.alone(start, group)])
    assert first.proximal is None  # the policy itself
    assert torch.allclose(second.proximal.sort().values, expected.sort().values, atol=1e-12)
    assert (second.proximal - now).abs().max() > 1e-3


def test_proximal_policy_is_not_computed_where_nothing_needs_it(tmp_path: Path) -> None:
    _, seen, _ = recorded(tmp_path, "learner.updates_per_step=2")
    assert [tokens.proximal for _, tokens in seen] == [None, None]


def test_own_tokens_are_those_of_the_learners_version_until_the_policy_moves(tmp_path: Path) -> None:
    learner, seen, updates = recorded(tmp_path, "learner.updates_per_step=2")
    learner.step(updates)  # the same tokens again, of version 0, at version 1
    assert [tokens.moved for _, tokens in seen] == [False, True, False, True]
    assert [tokens.staleness.unique().tolist() for _, tokens in seen] == [[0], [0], [1], [1]]


def test_reference_stays_where_the_policy_started(tmp_path: Path) -> None:
    learner, seen, updates = recorded(tmp_path, "algorithm.kl={ name = 'k3', coefficient = 0.5 }")
    learner.step(updates)
    (start, first), (moved, second) = seen
    assert torch.equal(first.reference, start)
    assert torch.equal(second.reference, start)
    assert (moved - start).abs().max() > 1e-3


def test_a_token_of_another_temperature_is_scaled_before_it_is_rounded() -> None:
    """In bfloat16 1 / 0.9 is 1.1094, and logits of 20 would all be off by 0.03."""

    class Keeping:
        def score(self, hidden: Tensor, targets: Tensor) -> Any:
            return hidden, None

    config = learning.configure(dtype="float32")
    model = build(config.model, vocab_size=learning.VOCAB, eos_id=1, pad_id=0, seed=3).bfloat16()
    batch = Batch.of(learning.take(config, learning.groups(4))[0].micro_batches[0][0], torch.device("cpu"))
    policy = Policy(model, Keeping(), 1.0)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = policy(batch)[0].double()
        scaled = policy(replace(batch, temperature=torch.full_like(batch.temperature, 0.9)))[0].double()
    factor = (scaled * plain).sum() / plain.square().sum()
    assert factor.item() == pytest.approx(1 / 0.9, rel=3e-4)


# ---- what the head is asked for ---------------------------------------------------------------------------------


def partly_idle(config: Any) -> list[Update]:
    """A take in which the second completion of every group has no advantage, and the third only at its first token."""
    (update,) = learning.take(config, learning.groups(3))
    (micro,) = update.micro_batches[0]
    place, first = micro.sequence % 4, np.diff(micro.sequence, prepend=-1) != 0
    idle = (place == 1) | ((place == 2) & ~first)
    advantage = np.where(idle, np.float32(0), micro.advantage)
    return [replace(update, micro_batches=[[replace(micro, advantage=advantage)]])]


@pytest.mark.parametrize("loss", ["reinforce", "gspo"])
def test_idle_completions_cost_no_head_where_only_trained_ones_are_measured(tmp_path: Path, loss: str) -> None:
    large = ("learner.tokens_per_micro_batch=4096", f"algorithm.loss.name='{loss}'", "ops.backend='reference'")
    outcomes = []
    for health in ("all", "trained"):
        config = learning.configure(f"ops.health='{health}'", *large)
        method = Recorder(compose(config.algorithm))
        learner = learning.learner(config, tmp_path, method)  # type: ignore[arg-type]
        metrics = learner.step(partly_idle(config))
        outcomes.append((len(method.seen[0][0]), learning.parameters(learner), metrics))
    (every, weights, metrics), (some, weights_2, metrics_2) = outcomes
    lengths = [length for group in learning.groups(3) for length in group.lengths]
    assert (every, some) == (sum(lengths), sum(lengths) - sum(lengths[1::4]))
    assert learning.largest_difference(weights, weights_2) < 1e-12
    assert metrics_2["loss"] == pytest.approx(metrics["loss"], rel=1e-12)
    assert metrics_2["num_tokens"] == metrics["num_tokens"]


def test_idle_completions_have_an_entropy_to_train(tmp_path: Path) -> None:
    large = ("learner.tokens_per_micro_batch=4096", "ops.backend='reference'")
    config = learning.configure("ops.health='trained'", *large, "algorithm.entropy=0.1")
    method = Recorder(compose(config.algorithm))
    learning.learner(config, tmp_path, method).step(partly_idle(config))  # type: ignore[arg-type]
    assert len(method.seen[0][0]) == sum(len(group.token_ids) for group in learning.groups(3))


def test_masked_tokens_cost_no_head(tmp_path: Path) -> None:
    config = learning.configure("learner.tokens_per_micro_batch=4096", "ops.backend='reference'")
    method = Recorder(compose(config.algorithm))
    (update,) = learning.take(config, learning.groups(3))
    (micro,) = update.micro_batches[0]
    mask = (np.arange(len(micro.mask)) % 3 > 0).astype(np.float32)
    learner = learning.learner(config, tmp_path, method)  # type: ignore[arg-type]
    metrics = learner.step([replace(update, micro_batches=[[replace(micro, mask=mask)]])])
    start = learning.learner(config, tmp_path).model
    scores = torch.cat([score for group in learning.groups(3) for score in learning.alone(start, group)])
    expected = -(scores * torch.from_numpy(mask * micro.advantage)).sum().item() / len(mask)
    assert len(method.seen[0][0]) == mask.sum()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-12)

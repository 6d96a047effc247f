"""The first update of the critic's methods on a fixed batch, against the formulas in plain float64 without packing.

VAPO has seven parts that its paper takes away one at a time; each changes the update, and as predicted.
"""

from pathlib import Path
from typing import Any

import learning
import msgspec
import numpy as np
import pytest
import torch
from learning import alone
from test_learner import gradients
from torch import Tensor, nn

from engine.algorithms.method import compose
from engine.attention import Layout
from engine.config import Config
from engine.learner_loop import prepare
from engine.model import backbone, hidden_states
from engine.schedule import Schedule
from engine.schema import Group
from engine.scores import shape_by
from rewards.verdict import Verdict

VAPO = (
    "algorithm.advantage={ name = 'gae_length_adaptive', alpha = 0.5 }",  # 0.05 would be 0 at such lengths
    "algorithm.loss={ name = 'ppo_clip', low = 0.2, high = 0.28 }",
    "algorithm.aggregate={ name = 'token_mean' }",
    "algorithm.imitation=0.1",
    "critic.pretrain_steps=2",
    "critic.lr=0.02",
    "critic.clip_norm=1e9",
)
WITHOUT = {
    "value pretraining": ["critic.pretrain_steps=0"],
    "decoupled lambda": ["algorithm.advantage.lambda_critic=0.5"],
    "length-adaptive lambda": ["algorithm.advantage={ name = 'gae', lambda_policy = 0.95 }"],
    "clip-higher": ["algorithm.loss.high=0.2"],
    "token-level loss": ["algorithm.aggregate={ name = 'sequence_mean' }"],
    "positive-example loss": ["algorithm.imitation=0.0"],
    "group sampling": ["run.group_size=1"],
}


def configure(*overrides: str) -> Config:
    return learning.configure(*VAPO, *overrides, model="gpt_neox")


def recorded(config: Config, directory: Path) -> list[Group]:
    """Three groups with ratios on either side of both clips; of each its first completion at a group size of 1."""
    model, rng = learning.learner(configure(), directory).model, np.random.default_rng(5)
    groups = []
    for group in learning.groups(3, seed=2):
        now = np.concatenate([scores.detach().numpy() for scores in alone(model, group)])
        verdicts = [Verdict.of(float(solved)) for solved in (True, False, True, False)]
        behaviour = (now - np.log(rng.choice([0.7, 1.0, 1.24, 1.4], len(now)))).astype(np.float32)
        groups.append(msgspec.structs.replace(group, logprobs=behaviour, verdicts=verdicts))
    return groups if config.run.group_size > 1 else [first(group) for group in groups]


def first(group: Group) -> Group:
    size = group.lengths[0]
    columns = {name: getattr(group, name)[:size] for name in ("token_ids", "logprobs", "versions", "loss_mask")}
    samples = {name: getattr(group, name)[:1] for name in ("lengths", "finish", "verdicts")}
    return msgspec.structs.replace(group, **columns, **samples)


# ---- the reference ---------------------------------------------------------------------------------------------


class Reference:
    """Policy and critic, one completion at a time."""

    def __init__(self, config: Config, directory: Path):
        self.config, self.advantage = config, dict(config.algorithm.advantage)
        self.policy = learning.learner(config, directory).model
        self.backbone = backbone(learning.learner(config, directory).model)
        self.score: Tensor = nn.Parameter(torch.zeros(16, dtype=torch.float64))

    def values(self, group: Group) -> list[Tensor]:
        ends, found = np.cumsum([0, *group.lengths]), []
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, group.token_ids[begin:end]]).astype(np.int64))
            hidden = hidden_states(self.backbone, ids, torch.arange(len(ids)), Layout(np.array([0, len(ids)])))
            found.append(hidden[len(group.prompt_ids) - 1 : -1] @ self.score)
        return found

    def pretrain(self, groups: list[Group]) -> None:
        """Each step regresses every value on the completion's reward."""
        parameters = [*self.backbone.parameters(), self.score]
        optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
        for _ in range(self.config.critic.pretrain_steps):
            self.critic_loss(groups, lambda_critic=1.0).backward()
            optimizer.step()
            optimizer.zero_grad()

    def critic_loss(self, groups: list[Group], lambda_critic: float) -> Tensor:
        errors = []
        for group in groups:
            for values, verdict in zip(self.values(group), group.verdicts, strict=True):
                target = values.detach() + advantages(verdict.score, values.detach(), lambda_critic)
                errors.append(values - target)
        return torch.cat(errors).square().mean() / 2

    def policy_loss(self, groups: list[Group]) -> Tensor:
        surrogate, weight, imitated = [], [], []
        loss, num_sequences = self.config.algorithm.loss, sum(group.num_samples for group in groups)
        num_tokens = sum(len(group.token_ids) for group in groups)
        for group in groups:
            behaviour = torch.from_numpy(group.logprobs).double().split(group.lengths)
            parts = zip(alone(self.policy, group), behaviour, self.values(group), group.verdicts, strict=True)
            for logprob, old, values, verdict in parts:
                lam = self.advantage.get("lambda_policy", 1 - 1 / max(0.5 * len(logprob), 1))
                gain = advantages(verdict.score, values.detach(), lam).float().double()
                ratio = (logprob - old).exp()
                surrogate.append(-torch.minimum(ratio * gain, ratio.clamp(0.8, 1 + loss["high"]) * gain))
                by_token = self.config.algorithm.aggregate["name"] == "token_mean"
                share = 1 / num_tokens if by_token else 1 / (len(logprob) * num_sequences)
                weight.append(torch.full_like(logprob, share))
                imitated += [-logprob] if verdict.solved else []
        policy = (torch.cat(surrogate) * torch.cat(weight)).sum()
        return policy + self.config.algorithm.imitation * torch.cat(imitated).mean()


def advantages(reward: float, values: Tensor, lam: float) -> Tensor:
    """Backwards, step by step."""
    following, carry, found = 0.0, 0.0, []
    for t in reversed(range(len(values))):
        delta = (reward if t == len(values) - 1 else 0.0) + following - float(values[t])
        following, carry = float(values[t]), delta + lam * carry
        found.append(carry)
    return torch.tensor(found[::-1], dtype=torch.float64)


# ---- the checks ------------------------------------------------------------------------------------------------


def first_update(config: Config, directory: Path) -> dict[str, Tensor]:
    """The gradient of the policy's first update."""
    groups, learner = recorded(config, directory), learning.learner(config, directory)
    how = Schedule(config), compose(config.algorithm), shape_by(config.algorithm)
    for _ in range(config.critic.pretrain_steps + 1):
        updates = prepare(*how, groups, learner.version)
        learner.step(updates)
    return gradients(learner)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, Tensor]:
    return first_update(configure(), tmp_path_factory.mktemp("vapo"))


@pytest.mark.parametrize("part", [None, *WITHOUT])
def test_the_first_update_is_that_of_the_formulas(part: str | None, whole: dict[str, Tensor], tmp_path: Path) -> None:
    config = configure(*WITHOUT[part] if part else ())
    found = whole if part is None else first_update(config, tmp_path)
    reference, groups = Reference(config, tmp_path), recorded(config, tmp_path)
    reference.pretrain(groups)
    reference.policy.zero_grad()
    reference.policy_loss(groups).backward()
    expected = {name: p.grad for name, p in reference.policy.named_parameters() if p.grad is not None}
    assert learning.largest_difference(found, expected) < 1e-7  # advantages travel in float32
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    if part not in (None, "decoupled lambda"):  # the critic's lambda shows in the critic's update, below
        assert learning.largest_difference(found, whole) > 1e-2 * size


@pytest.mark.parametrize("lambda_critic", [1.0, 0.5])
def test_the_critics_first_update_is_that_of_the_formulas(lambda_critic: float, tmp_path: Path) -> None:
    config = configure(f"algorithm.advantage.lambda_critic={lambda_critic}", "critic.pretrain_steps=0")
    groups, learner = recorded(config, tmp_path), learning.learner(config, tmp_path)
    assert learner.critic is not None
    reference = Reference(config, tmp_path)
    with torch.no_grad():  # a head of 0 sends no gradient to the backbone
        reference.score += 0.3
        learner.critic.load({**learner.critic.state(), "model": headed(learner.critic.state()["model"])})
    learner.step(prepare(Schedule(config), compose(config.algorithm), shape_by(config.algorithm), groups, 0))
    state = learner.critic.state()["optimizer"]["state"]
    found = {name: moments["exp_avg"].squeeze(0) / 0.1 for name, moments in state.items()}
    reference.critic_loss(groups, lambda_critic).backward()
    expected = {f"backbone.{name}": p.grad for name, p in reference.backbone.named_parameters() if p.grad is not None}
    assert reference.score.grad is not None
    expected["score.weight"] = reference.score.grad
    assert learning.largest_difference({name: found[name].view_as(expected[name]) for name in found}, expected) < 1e-10


def test_a_shared_critics_first_update_is_that_of_the_formulas_and_its_policys_too(tmp_path: Path) -> None:
    config = configure("critic.shared=true", "critic.pretrain_steps=0")
    groups, learner = recorded(config, tmp_path), learning.learner(config, tmp_path)
    assert learner.critic is not None
    reference = Reference(config, tmp_path)
    reference.backbone = backbone(reference.policy)
    with torch.no_grad():
        reference.score += 0.3
        learner.critic.load({**learner.critic.state(), "model": headed(learner.critic.state()["model"])})
    learner.step(prepare(Schedule(config), compose(config.algorithm), shape_by(config.algorithm), groups, 0))
    reference.critic_loss(groups, lambda_critic=1.0).backward()
    moments = learner.critic.state()["optimizer"]["state"]
    assert list(moments) == ["score.weight"]
    torch.testing.assert_close(moments["score.weight"]["exp_avg"].squeeze(0) / 0.1, reference.score.grad)
    reference.policy.zero_grad()  # the values' errors move no weight of the policy
    reference.policy_loss(groups).backward()
    expected = {name: p.grad for name, p in reference.policy.named_parameters() if p.grad is not None}
    assert learning.largest_difference(gradients(learner), expected) < 1e-7


def headed(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 0.3 if name == "score.weight" else tensor for name, tensor in model.items()}

"""The critic: learns alone first, is kept in checkpoints and on any number of ranks, and is read back by its path."""

from pathlib import Path
from typing import Any

import learning
import msgspec
import pytest
import torch
from msgspec import structs
from transformers import AutoModelForSequenceClassification

from engine import checkpoint, critic
from engine.algorithms.method import compose
from engine.config import Config, ConfigError
from engine.learner import Learner
from engine.learner_loop import prepare
from engine.model import build
from engine.optimizer import NonFinite
from engine.schedule import Schedule
from engine.schema import Group
from engine.scores import shape_by
from rewards.verdict import Verdict

GAE = ("algorithm.advantage={ name = 'gae' }", "critic.lr=0.02", "learner.updates_per_step=2")


def batch(scores: tuple[float, ...] = (1.0, 0.0, 0.0, 1.0)) -> list[Group]:
    verdicts = [Verdict.of(score) for score in scores]
    return [msgspec.structs.replace(group, verdicts=verdicts) for group in learning.groups(4)]


def step(config: Config, learner: Learner, groups: list[Group] | None = None) -> dict[str, float]:
    method, shape = compose(config.algorithm), shape_by(config.algorithm)
    return learner.step(prepare(Schedule(config), method, shape, batch() if groups is None else groups, 0))


def values(learner: Learner) -> dict[str, torch.Tensor]:
    assert learner.critic is not None
    return {name: tensor.clone() for name, tensor in learner.critic.weights()}


def test_pretraining_moves_the_critic_alone_and_its_values_come_to_explain_the_returns(tmp_path: Path) -> None:
    config = learning.configure(*GAE, "critic.pretrain_steps=12")
    learner = learning.learner(config, tmp_path)
    start, first = learning.parameters(learner), step(config, learner)
    assert first["explained_variance"] == 0 and first["value"] == 0 and "loss" not in first
    for _ in range(11):
        last = step(config, learner)
    assert last["explained_variance"] > 0.3
    assert last["value_loss"] < first["value_loss"] / 2
    assert last["value"] == pytest.approx(last["value_target"], abs=0.1)
    assert learning.largest_difference(start, learning.parameters(learner)) == 0
    assert (learner.steps, learner.version, learner.updates) == (12, 12, 0)
    assert learner.critic is not None and learner.critic.updates == 24
    after = step(config, learner)
    assert learner.updates == 2 and after["lr"] > 0
    assert learning.largest_difference(start, learning.parameters(learner)) > 0


def test_pretraining_is_on_returns_whatever_the_methods_lambda_is(tmp_path: Path) -> None:
    after = []
    for critic_lambda in (0.0, 1.0):
        config = learning.configure(*GAE, "critic.pretrain_steps=4")
        config.algorithm.advantage["lambda_critic"] = critic_lambda
        learner = learning.learner(config, tmp_path)
        for _ in range(3):
            step(config, learner)
        after.append(values(learner))
    assert learning.largest_difference(*after) == 0


def test_a_group_of_one_and_a_uniform_group_teach_too(tmp_path: Path) -> None:
    config = learning.configure(*GAE)
    learner = learning.learner(config, tmp_path)
    before = learning.parameters(learner)
    step(config, learner, batch((1.0, 1.0, 1.0, 1.0)))
    assert learning.largest_difference(before, learning.parameters(learner)) > 0


def test_a_checkpoint_holds_critic_and_optimiser(tmp_path: Path) -> None:
    config = learning.configure(*GAE, "critic.pretrain_steps=1")
    learner = learning.learner(config, tmp_path)
    for _ in range(2):
        step(config, learner)
    path = checkpoint.save(tmp_path, config, learner)
    again = learning.learner(config, tmp_path)
    checkpoint.load(path, again)
    for each in (learner, again):
        step(config, each)
    assert learning.largest_difference(values(learner), values(again)) == 0
    assert learning.largest_difference(learning.parameters(learner), learning.parameters(again)) == 0
    assert learner.critic is not None and again.critic is not None
    assert learner.critic.updates == again.critic.updates == 6


def on_rank(rank: int, directory: Path) -> Any:
    """After three steps, of a critic with a backbone of its own and of a shared one."""
    return [three_steps(directory, shared) for shared in ("false", "true")]


def three_steps(directory: Path, shared: str) -> Any:
    config = learning.configure(*GAE, "critic.pretrain_steps=1", f"critic.shared={shared}")
    learner = learning.learner(config, directory)
    how = Schedule(config), compose(config.algorithm), shape_by(config.algorithm)
    updates = [prepare(*how, batch(), 0) for _ in range(3)]
    figures = [learner.step(update) for update in updates]
    return values(learner), learning.parameters(learner), figures[-1]


def test_two_ranks_make_the_same_steps(tmp_path: Path) -> None:
    alone = on_rank(0, tmp_path)
    for both in learning.on_ranks(2, on_rank, tmp_path):
        bounds = 1e-9, 1e-7  # advantages travel in float32, and a shared critic holds the policy's weights
        for one, two, bound in zip(alone, both, bounds, strict=True):
            (critic, policy, figures), (critic_2, policy_2, figures_2) = one, two
            assert learning.largest_difference(policy, policy_2) < 1e-7
            assert learning.largest_difference(critic, critic_2) < bound
            for name in ("explained_variance", "value_loss", "critic_grad_norm"):
                assert figures_2[name] == pytest.approx(figures[name], rel=1e-6)


def test_an_exported_critic_is_found_by_its_path_and_by_others(tmp_path: Path) -> None:
    config = learning.configure(*GAE)
    learner = learning.learner(config, tmp_path)
    step(config, learner)
    assert learner.critic is not None
    learner.critic.export(tmp_path / "critic")
    read = learning.learner(learning.configure(*GAE, f"critic.path={tmp_path / 'critic'}"), tmp_path)
    assert learning.largest_difference(values(learner), values(read)) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic", dtype=torch.float64)
    assert theirs.config.num_labels == 1
    assert torch.equal(theirs.score.weight, values(learner)["score.weight"])


def test_a_critic_of_the_hub_has_its_head_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model by its hub id; transformers reads causal language models without that head."""
    learner = learning.learner(learning.configure(*GAE), tmp_path)
    step(learning.configure(*GAE), learner)
    assert learner.critic is not None
    learner.critic.export(tmp_path)
    monkeypatch.setattr(critic, "snapshot_download", lambda path, **_: {"org/reward": str(tmp_path)}[path])
    here = {"path": str(tmp_path)}
    monkeypatch.setattr(critic, "build", lambda source, **how: build(structs.replace(source, **here), **how))
    read = learning.learner(learning.configure(*GAE, "critic.path=org/reward"), tmp_path)
    assert values(read)["score.weight"].any()
    assert learning.largest_difference(values(learner), values(read)) == 0


def test_a_shared_critic_learns_alone_while_the_policy_stands_still_and_is_kept(tmp_path: Path) -> None:
    config = learning.configure(*GAE, "critic.shared=true", "critic.pretrain_steps=5")
    learner = learning.learner(config, tmp_path)
    start, first = learning.parameters(learner), step(config, learner)
    for _ in range(4):
        last = step(config, learner)
    assert last["value_loss"] < 0.9 * first["value_loss"]
    assert learning.largest_difference(start, learning.parameters(learner)) == 0
    step(config, learner)
    policy, kept = learning.parameters(learner), values(learner)
    assert learning.largest_difference(start, policy) > 0
    common = policy.keys() & kept.keys()
    assert len(common) == len(kept) - 1  # all but the head
    assert all(torch.equal(policy[name], kept[name]) for name in common)
    again = learning.learner(config, tmp_path)
    checkpoint.load(checkpoint.save(tmp_path, config, learner), again)
    assert learning.largest_difference(values(learner), values(again)) == 0
    assert learner.critic is not None
    learner.critic.export(tmp_path / "critic")
    own = learning.learner(learning.configure(*GAE, f"critic.path={tmp_path / 'critic'}"), tmp_path)
    assert learning.largest_difference(values(learner), values(own)) == 0


def test_a_shared_critic_has_no_path() -> None:
    with pytest.raises(ConfigError, match="critic.path = 'reward-model': a shared critic has no model of its own"):
        learning.configure(*GAE, "critic.shared=true", "critic.path=reward-model")


def test_a_policy_as_the_critics_path_begins_with_values_of_0(tmp_path: Path) -> None:
    learning.learner(learning.configure(), tmp_path).model.save_pretrained(tmp_path / "policy")
    learner = learning.learner(learning.configure(*GAE, f"critic.path={tmp_path / 'policy'}"), tmp_path)
    assert not values(learner)["score.weight"].any()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="critic.path = .*empty"):
        learning.learner(learning.configure(*GAE, f"critic.path={tmp_path / 'empty'}"), tmp_path)


def test_updates_of_the_critic_that_are_not_finite_are_skipped_and_end_the_job(tmp_path: Path) -> None:
    config = learning.configure(*GAE, "critic.pretrain_steps=9", "learner.max_bad_updates=3")
    learner = learning.learner(config, tmp_path)
    before = values(learner)
    spoiled = batch((float("inf"), 0.0, 0.0, 0.0))
    assert step(config, learner, spoiled)["critic_skipped_updates"] == 2
    assert learning.largest_difference(before, values(learner)) == 0
    with pytest.raises(NonFinite, match="3 updates of the critic in a row"):
        step(config, learner, spoiled)

"""The learner: what one step does to the parameters, however the take was split over micro-batches and ranks."""

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import learning
import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from engine import head, parallel, policy
from engine.config import ConfigError
from engine.config import Learner as LearnerConfig
from engine.learner import Learner
from engine.learner_loop import became
from engine.model import build, lm_head
from engine.optimizer import NonFinite, learning_rate
from engine.packer import Update
from engine.schema import Trained


def gradients(learner: Learner) -> dict[str, Tensor]:
    """The gradient of the only update so far, from AdamW's first moment: exp_avg = (1 - 0.9) * gradient."""
    state = learner.state()["optimizer"]["state"]
    return {name: whole(moments["exp_avg"]) / 0.1 for name, moments in state.items()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def stepped(directory: Path, *overrides: str, num_groups: int = 3, **options: Any) -> Learner:
    """A learner of one rank after one step."""
    config = learning.configure(*overrides, **options)
    learner = learning.learner(config, directory)
    learner.step(learning.take(config, learning.groups(num_groups)))
    return learner


# ---- the gradient ----------------------------------------------------------------------------------------------


def test_gradient_is_that_of_the_formula_computed_without_packing(tmp_path: Path) -> None:
    config = learning.configure(model="gpt_neox")
    learner, batch = learning.learner(config, tmp_path), learning.groups(2)
    reference = learning.learner(config, tmp_path).model
    terms = [
        -advantage * score
        for group in batch
        for score, advantage in zip(learning.alone(reference, group), learning.FIXED, strict=True)
    ]
    loss = torch.cat(terms).sum() / sum(len(group.token_ids) for group in batch)
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    metrics = learner.step(learning.take(config, batch))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-12)
    assert learning.largest_difference(gradients(learner), expected) < 1e-12


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_micro_batches_do_not_change_the_step(tmp_path: Path, aggregate: str) -> None:
    name = f"algorithm.aggregate.name='{aggregate}'"
    small = stepped(tmp_path, name, "learner.share_prefix=false", model="gpt_neox")
    large = stepped(tmp_path, name, "learner.tokens_per_micro_batch=4096", model="gpt_neox")
    assert learning.largest_difference(learning.parameters(small), learning.parameters(large)) < 1e-10


def test_step_moves_every_parameter_and_the_counters(tmp_path: Path) -> None:
    config = learning.configure()
    learner = learning.learner(config, tmp_path)
    before = learning.parameters(learner)
    metrics = learner.step(learning.take(config, learning.groups(2)))
    after = learning.parameters(learner)
    assert all((before[name] != after[name]).any() for name in before)
    assert (learner.version, learner.steps, learner.updates, learner.bad_updates) == (1, 1, 1, 0)
    assert metrics["num_tokens"] == sum(len(group.token_ids) for group in learning.groups(2))
    assert metrics["lr"] == 0.01 and metrics["skipped_updates"] == 0


def test_a_checkpoint_before_the_first_step_leaves_no_trace(tmp_path: Path) -> None:
    config = learning.configure()
    stepped = []
    for saves in (False, True):
        learner = learning.learner(config, tmp_path)
        if saves:
            learner.state()
        learner.step(learning.take(config, learning.groups(2)))
        stepped.append(learning.parameters(learner))
    assert learning.largest_difference(*stepped) == 0.0


def test_clipping_scales_the_gradient_to_the_norm(tmp_path: Path) -> None:
    free = gradients(stepped(tmp_path))
    clipped = gradients(stepped(tmp_path, "learner.clip_norm=0.001"))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in free.values()))
    assert norm > 0.001
    scaled = {name: gradient * (0.001 / norm) for name, gradient in free.items()}
    assert learning.largest_difference(clipped, scaled) < 1e-12


def test_matrices_decay_and_norms_do_not(tmp_path: Path) -> None:
    config = learning.configure("learner.weight_decay=0.5")
    learner = learning.learner(config, tmp_path)
    before = learning.parameters(learner)
    updates = learning.take(config, learning.groups(2))
    nothing = [[replace(m, advantage=0 * m.advantage) for m in ms] for ms in updates[0].micro_batches]
    learner.step([replace(updates[0], micro_batches=nothing)])
    for name, tensor in learner.weights():
        factor = 1.0 if "norm" in name else 1 - 0.01 * 0.5
        assert torch.allclose(tensor, before[name] * factor, rtol=1e-12), name


def test_recomputed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    kept = stepped(tmp_path)
    recomputed = stepped(tmp_path, "learner.activation_checkpointing=true")
    assert learning.largest_difference(gradients(kept), gradients(recomputed)) < 1e-14


def test_a_model_that_names_no_layers_cannot_recompute_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(learning.configure().model, vocab_size=learning.VOCAB, eos_id=1, pad_id=0, seed=3)
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(ConfigError, match="activation_checkpointing: Qwen3ForCausalLM does not name its layers"):
        policy.recompute_activations(model)


def test_logits_in_pieces_give_the_same_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = stepped(tmp_path, "algorithm.entropy=0.1", "ops.backend='reference'")
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 3 * learning.VOCAB)
    in_pieces = stepped(tmp_path, "algorithm.entropy=0.1", "ops.backend='reference'")
    assert learning.largest_difference(gradients(at_once), gradients(in_pieces)) < 1e-14


# ---- ranks -----------------------------------------------------------------------------------------------------


def step_on_rank(rank: int, directory: Path, cases: list[dict[str, Any]], num_ranks: int) -> list[Any]:
    """Parameters, gradients and metrics of each case after one step, gathered on this rank."""
    results = []
    for case in cases:
        config = learning.configure(*case["overrides"], **case["options"])
        learner = learning.learner(config, directory)
        metrics = learner.step(learning.take(config, learning.groups(case["groups"]), num_ranks))
        if num_ranks > 1 and (reference := learner._reference) is not None:  # it is whole during a forward only
            assert all(parallel.shards(p) is not p for p in reference.parameters())
        results.append((learning.parameters(learner), gradients(learner), metrics))
    return results


REFERENCE = (
    "algorithm.kl={ name = 'k3', coefficient = 0.1 }",
    "learner.updates_per_step=2",
    "algorithm.correction.name='decoupled'",
)
PLAIN = "ops.backend='reference'"
CASES: list[dict[str, Any]] = [
    {"options": {}, "groups": 3, "overrides": (PLAIN,)},
    {"options": {"tied": False, "model": "gpt_neox"}, "groups": 3, "overrides": (PLAIN, *REFERENCE)},
    {"options": {}, "groups": 1, "overrides": (PLAIN, "learner.activation_checkpointing=true")},
    {"options": {}, "groups": 3, "overrides": ()},
    {"options": {"tied": False}, "groups": 3, "overrides": ("learner.activation_checkpointing=true",)},
    {"options": {}, "groups": 1, "overrides": ()},  # one unit of work: the other ranks run empty micro-batches
    {"options": {"model": "gpt_neox"}, "groups": 3, "overrides": REFERENCE},
    {"options": {"tied": False}, "groups": 3, "overrides": ("algorithm.entropy=0.1", "generator.temperature=0.7")},
    {"options": {"dtype": "float32"}, "groups": 3, "overrides": ()},
]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_makes_the_same_step(tmp_path: Path, num_ranks: int) -> None:
    alone = step_on_rank(0, tmp_path, CASES, 1)
    for of_rank in learning.on_ranks(num_ranks, step_on_rank, tmp_path, CASES, num_ranks):
        for case, (weights, grads, metrics), (weights_1, grads_1, metrics_1) in zip(CASES, of_rank, alone, strict=True):
            assert weights.keys() == weights_1.keys()
            double = "dtype" not in case["options"]
            if double:
                assert learning.largest_difference(weights, weights_1) < 1e-10, case
                assert metrics == pytest.approx(metrics_1, rel=1e-6), case
            for name in grads_1:
                error = (grads[name] - grads_1[name]).norm() / grads_1[name].norm()
                assert error < (1e-10 if double else 1e-5), (case, name)


def heads_on_rank(rank: int, directory: Path) -> list[Any]:
    """One step of each case in mixed precision: what a layer, the last norm and the head computed in, as (weight,
    input, whether some outputs were finer than bfloat16); the gradients, and those of the fused backend."""
    results = []
    for tied, fp32_head in HEADS:
        mixed = ("learner.mixed_precision=true", f"model.fp32_head={str(fp32_head).lower()}")
        fused = learning.configure(*mixed, dtype="float32", tied=tied)
        config = learning.configure(*mixed, PLAIN, dtype="float32", tied=tied)
        learner = learning.learner(config, directory)
        seen: dict[str, Any] = {}

        def watch(name: str, module: Any, inputs: Any, output: Tensor, seen: dict[str, Any] = seen) -> None:
            finer = bool((output != output.bfloat16()).any())
            seen[name] = module.weight.dtype, inputs[0].dtype, finer or (name in seen and seen[name][2])

        layer, norm = map(learner.model.get_submodule, ("model.layers.1.mlp.up_proj", "model.norm"))
        for name, module in (("layer", layer), ("norm", norm), ("head", lm_head(learner.model))):
            module.register_forward_hook(partial(watch, name))
        learner.step(learning.take(config, learning.groups(4), 2))
        learner_2 = learning.learner(fused, directory)
        learner_2.step(learning.take(fused, learning.groups(4), 2))
        results.append((seen, gradients(learner), gradients(learner_2)))
    return results


HEADS = [(True, False), (True, True), (False, False), (False, True)]  # tied, fp32_head


def test_mixed_precision_with_and_without_a_wide_head(tmp_path: Path) -> None:
    half, single = torch.bfloat16, torch.float32
    for results in learning.on_ranks(2, heads_on_rank, tmp_path):
        for (tied, fp32_head), (seen, *both) in zip(HEADS, results, strict=True):
            head = (single, single, True) if fp32_head else (half, half, False)
            assert seen == {"layer": (half, half, False), "norm": head, "head": head}
            exact = gradients(stepped(tmp_path, num_groups=4, dtype="float32", tied=tied))
            for (name, gradient), grads in itertools.product(exact.items(), both):
                assert (grads[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_rank_without_work_still_runs_the_model_on_one_token() -> None:
    config = learning.configure()
    idle = learning.take(config, learning.groups(1), 2)[0].micro_batches[1]
    batch = policy.Batch.of(idle[0], torch.device("cpu"))
    assert len(idle) == 1 and len(idle[0].token_ids) == 0
    assert batch.token_ids.tolist() == batch.position_ids.tolist() == [0]
    assert batch.layout.num_tokens == 1 and len(batch.targets) == 0


def test_tied_weights_are_named_once(tmp_path: Path) -> None:
    tied = dict(learning.learner(learning.configure(), tmp_path).weights())
    untied = dict(learning.learner(learning.configure(tied=False), tmp_path).weights())
    assert "lm_head.weight" not in tied
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


# ---- updates that are not finite -------------------------------------------------------------------------------


def spoil(update: Update, rank: int) -> Update:
    """`update` with an infinite advantage in the first token of the first micro-batch of `rank`."""
    first, *rest = update.micro_batches[rank]
    advantage = first.advantage.copy()
    advantage[0] = np.inf
    mine = [replace(first, advantage=advantage), *rest]
    micro_batches = [mine if number == rank else other for number, other in enumerate(update.micro_batches)]
    return replace(update, micro_batches=micro_batches)


def test_bad_update_changes_nothing_and_is_kept(tmp_path: Path) -> None:
    config = learning.configure()
    learner = learning.learner(config, tmp_path)
    good = learning.take(config, learning.groups(2))
    learner.step(good)
    before, moments = learning.parameters(learner), gradients(learner)
    metrics = learner.step([spoil(good[0], 0)])
    assert metrics["skipped_updates"] == 1
    assert (learner.version, learner.updates, learner.bad_updates) == (2, 1, 1)
    assert learning.largest_difference(before, learning.parameters(learner)) == 0
    assert learning.largest_difference(moments, gradients(learner)) == 0
    kept = torch.load(tmp_path / "bad_update_1_rank_0.pt")
    assert kept["version"] == 1 and torch.isinf(kept["micro_batches"][0]["advantage"][0])
    assert "model.embed_tokens.weight" in kept["parameters"]
    assert learner.step(good)["skipped_updates"] == 0
    assert learning.largest_difference(before, learning.parameters(learner)) > 0


def test_of_a_take_in_several_updates_only_the_bad_one_fails(tmp_path: Path) -> None:
    config = learning.configure("learner.updates_per_step=2")
    learner = learning.learner(config, tmp_path)
    updates = learning.take(config, learning.groups(3))
    assert [update.group_ids for update in updates] == [[0, 1], [2]]
    learner.step([updates[0], spoil(updates[1], 0)])
    assert learner.skipped == [1]
    trained = became(1, updates, learner.skipped, entropy=0.5)
    assert trained == Trained(1, [0, 1, 2], "trained", "non-finite update", 0.5, skipped=[2])
    assert [trained.end_of(group_id) for group_id in trained.group_ids] == ["trained", "trained", "failed"]
    learner.step(updates)
    assert learner.skipped == [] and became(2, updates, [], None) == Trained(2, [0, 1, 2], "trained")
    assert became(3, updates, [0, 1], None).end == "failed"


def test_bad_updates_in_a_row_end_the_job(tmp_path: Path) -> None:
    config = learning.configure("learner.max_bad_updates=2")
    learner = learning.learner(config, tmp_path)
    good = learning.take(config, learning.groups(2))
    bad = [spoil(good[0], 0)]
    learner.step(bad)
    learner.step(good)
    learner.step(bad)
    with pytest.raises(NonFinite, match="2 updates in a row"):
        learner.step(bad)


def spoiled_on_rank(rank: int, directory: Path) -> tuple[float, int]:
    config = learning.configure()
    learner = learning.learner(config, directory)
    before = learning.parameters(learner)
    learner.step([spoil(update, 1) for update in learning.take(config, learning.groups(3), 2)])
    return learning.largest_difference(before, learning.parameters(learner)), learner.bad_updates


def test_all_ranks_skip_what_one_of_them_cannot_apply(tmp_path: Path) -> None:
    assert learning.on_ranks(2, spoiled_on_rank, tmp_path) == [(0.0, 1), (0.0, 1)]


# ---- scores ----------------------------------------------------------------------------------------------------


def test_mismatch_is_the_mean_distance_from_the_record(tmp_path: Path) -> None:
    config = learning.configure("generator.temperature=0.7")
    learner = learning.learner(config, tmp_path)
    batch = []
    for group in learning.groups(3):
        temperature = 0.7 + group.group_id / 4  # each group at its own, as a schedule may have it
        scores = torch.cat(learning.alone(learner.model, group, temperature)).detach().numpy()
        shift = np.where(np.arange(len(scores)) % 2, 0.25, -0.25).astype(np.float32)
        batch.append(msgspec.structs.replace(group, logprobs=shift + np.float32(scores), temperature=temperature))
    assert learner.mismatch(batch) == pytest.approx(0.25, abs=1e-6)


def test_schedule_rises_then_falls() -> None:
    config = LearnerConfig(tokens_per_micro_batch=1, lr=1.0, warmup_steps=4, schedule="cosine")
    assert [learning_rate(config, n, 12) for n in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert learning_rate(config, 4, 12) == 1.0
    assert learning_rate(config, 8, 12) == pytest.approx(0.5)
    assert learning_rate(config, 6, 12) == pytest.approx(0.5 + math.sqrt(2) / 4)
    assert learning_rate(config, 12, 12) == learning_rate(config, 99, 12) == pytest.approx(0.0)
    linear = LearnerConfig(tokens_per_micro_batch=1, lr=2.0, schedule="linear")
    assert [learning_rate(linear, n, 4) for n in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    ending = LearnerConfig(tokens_per_micro_batch=1, lr=2.0, schedule="linear", lr_end=1.0, warmup_steps=1)
    assert [learning_rate(ending, n, 3) for n in (0, 1, 2, 3, 9)] == [2.0, 2.0, 1.5, 1.0, 1.0]
    constant = LearnerConfig(tokens_per_micro_batch=1, lr=2.0)
    assert learning_rate(constant, 7, 4) == 2.0

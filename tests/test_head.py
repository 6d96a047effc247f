"""The head on the kernels against the head in plain torch: losses, health, gradients, whole steps."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning
import pytest
import torch
from torch import Tensor, nn

from engine.algorithms.corrections import CORRECTIONS
from engine.algorithms.losses import LOSSES
from engine.algorithms.method import Method, Tokens, compose
from engine.config import Algorithm
from engine.head import Fused, Reference, head_of

CPU = torch.device("cpu")
VOCAB, WIDTH, LENGTHS = 37, 12, [3, 1, 0, 4, 7]
COUNTS = {"num_tokens": 20, "num_sequences": 6}
ARGUMENTS = {"cispo": {"high": 0.3}, "gspo": {"low": 0.1, "high": 0.1}, "gspo_token": {"low": 0.1, "high": 0.1}}


def method(loss: str = "ppo_clip", correction: str = "none", **slots: Any) -> Method:
    return compose(Algorithm(loss={"name": loss, **ARGUMENTS.get(loss, {})}, correction={"name": correction}, **slots))


def batch(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor, Tokens]:
    """Hidden states, a head, targets, and tokens sampled by a policy near the one that these are."""
    generator = torch.Generator().manual_seed(seed)
    number = sum(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, linear = normal(number, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    linear.weight.data = 0.3 * normal(VOCAB, WIDTH)
    targets = torch.randint(VOCAB, (number,), generator=generator)
    logprob = Reference(linear, 0.7, method()).score(hidden, targets)[0].detach()
    proximal = logprob + 0.2 * normal(number)
    tokens = Tokens(
        behaviour=(proximal + 0.4 * normal(number)).to(dtype),
        advantage=normal(number).to(dtype),
        mask=(torch.rand(number, generator=generator) > 0.2).to(dtype),
        sequence=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        lengths=torch.tensor(LENGTHS),
        proximal=proximal.to(dtype),
        reference=(logprob + 0.3 * normal(number)).to(dtype),
        staleness=torch.randint(3, (number,), generator=generator, dtype=torch.int32),
    )
    return hidden.to(dtype).requires_grad_(), linear.to(dtype), targets, tokens


def outcome(kind: Any, given: tuple[Tensor, nn.Linear, Tensor, Tokens], method: Method) -> dict[str, Tensor]:
    """Loss, sums and gradients of one head."""
    hidden, linear, targets, tokens = given
    loss, sums = kind(linear, 0.7, method).loss(hidden, targets, tokens, **COUNTS)
    d_hidden, d_weight = torch.autograd.grad(3.0 * loss, (hidden, linear.weight))
    return {"loss": loss.detach(), **sums, "d hidden": d_hidden, "d weight": d_weight}


def agree(given: Any, method: Method, tolerance: float) -> None:
    fused, reference = outcome(Fused, given, method), outcome(Reference, given, method)
    assert fused.keys() == reference.keys()
    for name, expected in reference.items():
        error = (fused[name].double() - expected.double()).norm()
        assert error <= tolerance * max(1.0, float(expected.double().norm())), name


PENALTIES = {
    "plain": {},
    "kl": {"kl": {"name": "k3", "coefficient": 0.1}},
    "corrected": {"kl": {"name": "k2", "coefficient": 0.1, "corrected": True}, "entropy": 0.05},
    "entropy": {"entropy": -0.02},
}


PAIRS = zip(itertools.product(LOSSES, CORRECTIONS), itertools.cycle([*PENALTIES, "plain"]), strict=False)


@pytest.mark.parametrize(("loss", "correction", "penalty"), [(*slots, penalty) for slots, penalty in PAIRS])
def test_kernels_and_reference_agree(loss: str, correction: str, penalty: str) -> None:
    composed = method(loss, correction, **PENALTIES[penalty])
    assert Fused(nn.Linear(2, 2, bias=False), 1.0, composed)._recipe is not None
    agree(batch(torch.float64), composed, 1e-12)
    agree(batch(torch.float32), composed, 1e-5)


@pytest.mark.parametrize("correction", ["none", "tis", "sequence"])
def test_they_agree_where_the_policy_is_its_own_proximal(correction: str) -> None:
    hidden, linear, targets, tokens = batch(torch.float64)
    tokens = replace(tokens, proximal=None, staleness=torch.zeros(len(targets), dtype=torch.int32), moved=True)
    agree((hidden, linear, targets, tokens), method(correction=correction), 1e-12)


def test_a_slot_of_your_own_runs_on_the_kernels_log_probabilities() -> None:
    def surrogate(logprob: Tensor, proximal: Tensor, advantage: Tensor, completions: Any) -> tuple[Tensor, Tensor]:
        return advantage * (logprob - proximal).square(), advantage > 0

    own = replace(method(entropy=0.1), surrogate=surrogate)
    assert Fused(nn.Linear(2, 2, bias=False), 1.0, own)._recipe is None
    agree(batch(torch.float64), own, 1e-12)


def test_without_tokens_the_gradient_is_zero() -> None:
    hidden, linear, targets, tokens = batch(torch.float32)
    names = [name for name, value in vars(tokens).items() if isinstance(value, Tensor)]
    none = replace(tokens, **{name: getattr(tokens, name)[:0] for name in names})
    result = outcome(Fused, (hidden[:0], linear, targets[:0], none), method())
    assert result["loss"] == result["tokens"] == 0 and not result["d weight"].any()
    assert result["d hidden"].shape == (0, WIDTH)


def test_a_head_with_a_bias_goes_to_the_reference_and_is_warned_of() -> None:
    biased = nn.Linear(WIDTH, VOCAB)
    with pytest.warns(UserWarning, match="ops.backend = 'fused'"):
        assert isinstance(head_of(biased, "fused", CPU, 1.0, method()), Reference)


def test_a_device_without_kernels_goes_to_the_reference_and_is_warned_of() -> None:
    plain = nn.Linear(WIDTH, VOCAB, bias=False)
    with pytest.warns(UserWarning, match="no kernels for meta"):
        assert isinstance(head_of(plain, "fused", torch.device("meta"), 1.0, method()), Reference)


def test_a_plain_head_goes_where_it_is_told(recwarn: pytest.WarningsRecorder) -> None:
    plain = nn.Linear(WIDTH, VOCAB, bias=False)
    assert isinstance(head_of(plain, "fused", CPU, 1.0, method()), Fused)
    assert isinstance(head_of(plain, "reference", CPU, 1.0, method()), Reference)
    assert not recwarn.list


# ---- whole steps -------------------------------------------------------------------------------------------------

RECIPES = {
    "reinforce": (),
    "decoupled": (
        "algorithm.correction.name='decoupled'",
        "algorithm.loss.name='ppo_clip'",
        "learner.updates_per_step=2",
    ),
    "penalised": (
        "algorithm.kl={ name = 'k3', coefficient = 0.1 }",
        "algorithm.entropy=0.05",
        "generator.temperature=0.7",
    ),
    "gspo": ("algorithm.loss={ name = 'gspo', low = 0.1, high = 0.1 }", "algorithm.aggregate.name='sequence_mean'"),
}


def trained(directory: Path, backend: str, *overrides: str, **options: Any) -> tuple[dict[str, Tensor], list[dict]]:
    """Parameters and metrics after four steps on takes that are recorded once for both backends."""
    config = learning.configure(f"ops.backend='{backend}'", *overrides, **options)
    learner = learning.learner(config, directory)
    metrics = [learner.step(learning.take(config, learning.groups(4, seed))) for seed in range(4)]
    return learning.parameters(learner), metrics


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_backends_train_the_same_policy(tmp_path: Path, recipe: str, tied: bool) -> None:
    shape: dict[str, Any] = {"model": "gpt_neox", "tied": tied}  # float64 throughout
    weights, metrics = trained(tmp_path, "fused", *RECIPES[recipe], **shape)
    weights_2, metrics_2 = trained(tmp_path, "reference", *RECIPES[recipe], **shape)
    assert learning.largest_difference(weights, weights_2) < 1e-10
    for ours, theirs in zip(metrics, metrics_2, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-12)


def test_both_backends_train_the_same_policy_in_float32(tmp_path: Path) -> None:
    sgd_like = ("learner.eps=1.0",)  # AdamW divides by the gradient's size: no digits would be left of a small one
    weights, metrics = trained(tmp_path, "fused", *sgd_like, dtype="float32")
    weights_2, metrics_2 = trained(tmp_path, "reference", *sgd_like, dtype="float32")
    assert learning.largest_difference(weights, weights_2) < 1e-5
    for ours, theirs in zip(metrics, metrics_2, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)

"""Wrong arguments of the operators end in an exception that names them, never in a crash or in wrong numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import PPO, Case
from torch import Tensor

from engine.ops.loss import Recipe, linear_stats, linear_token_loss, row_stats, token_loss, token_loss_

CASE = Case(PPO, torch.float32, [2, 3], 7)
NAN = float("nan")

# What each function takes; tokens' fields stand beside the others.
KNOWN: dict[str, Any] = {
    **{name: value for name, value in vars(CASE.tokens).items()},
    "reference": CASE.tokens.behaviour,
    "hidden": CASE.head[0],
    "weight": CASE.head[1],
    "targets": CASE.head[2],
    "logits": CASE.logits,
    "recipe": CASE.recipe,
    "temperature": 1.0,
    "num_bins": 4,
}
OF_TOKENS = {*vars(CASE.tokens), "recipe", "num_bins"}
OF_LOGITS = {"logits", "targets", "temperature"}
OF_HIDDEN = {"hidden", "weight", "targets", "temperature"}


def call(function: Callable, given: dict[str, Any]) -> Any:
    rows = [given["logits"]] if function in (row_stats, token_loss, token_loss_) else [given["hidden"], given["weight"]]
    rows = [row.clone() if isinstance(row, Tensor) and function is token_loss_ else row for row in rows]
    if function in (row_stats, linear_stats):
        return function(*rows, given["targets"], temperature=given["temperature"])
    tokens = replace(CASE.tokens, **{name: given[name] for name in vars(CASE.tokens)})
    options = {name: given[name] for name in ("temperature", "num_bins")}
    return function(*rows, given["targets"], tokens, given["recipe"], **options)


ARGUMENTS = {
    row_stats: OF_LOGITS,
    token_loss: OF_LOGITS | OF_TOKENS,
    token_loss_: OF_LOGITS | OF_TOKENS,
    linear_stats: OF_HIDDEN,
    linear_token_loss: OF_HIDDEN | OF_TOKENS,
}

WRONG = [
    ("targets", torch.tensor([0, 1, 2, 3, 7]), "targets: value 7 at row 4 is not in vocab 0..6"),
    ("targets", torch.tensor([0, -1, 2, 3, 4]), "targets: value -1 at row 1"),
    ("targets", torch.zeros(5, dtype=torch.int32), "targets: is of type Int"),
    ("targets", torch.zeros(4, dtype=torch.int64), "targets: has shape"),
    ("targets", torch.zeros(5, 1, dtype=torch.int64), "targets: has shape"),
    ("logits", torch.zeros(5), "logits: has 1 dimensions"),
    ("logits", torch.zeros(5, 7, dtype=torch.int64), "logits: is of type Long"),
    ("logits", torch.zeros(5, 0), "logits: has rows of no elements"),
    ("hidden", torch.zeros(6), "hidden: has 1 dimensions"),
    ("hidden", torch.zeros(5, 5), "hidden: has 5 columns, weight 6"),
    ("hidden", torch.zeros(5, 6, dtype=torch.float64), "hidden: is of type Double"),
    ("weight", torch.zeros(6), "weight: has 1 dimensions"),
    ("weight", torch.zeros(0, 6), "weight: has no rows"),
    ("weight", torch.zeros(7, 6, dtype=torch.int8), "weight: is of type Char"),
    ("temperature", 0.0, "temperature: must be above 0, not 0"),
    ("temperature", -1.0, "temperature: must be above 0, not -1"),
    ("temperature", NAN, "temperature: must be above 0, not nan"),
    ("temperature", float("inf"), "temperature: must be above 0, not inf"),
    ("num_bins", 0, "num_bins: must be from 1"),
    ("cu_seqlens", torch.tensor([0, 3, 2, 5], dtype=torch.int32), "cu_seqlens: must rise from 0 to 5"),
    ("cu_seqlens", torch.tensor([1, 5], dtype=torch.int32), "cu_seqlens: must rise"),
    ("cu_seqlens", torch.tensor([0, 6], dtype=torch.int32), "cu_seqlens: must rise"),
    ("cu_seqlens", torch.tensor([0, 4], dtype=torch.int32), "cu_seqlens: must rise"),
    ("cu_seqlens", torch.tensor([0], dtype=torch.int32), "cu_seqlens: must rise"),
    ("cu_seqlens", torch.tensor([], dtype=torch.int32), "cu_seqlens: has shape"),
    ("cu_seqlens", torch.tensor([0, 5]), "cu_seqlens: is of type Long"),
    *[(name, torch.zeros(4), f"{name}: has shape") for name in ("behaviour", "proximal", "reference", "advantage")],
    *[(name, torch.zeros(5).double(), f"{name}: is of type Double") for name in ("behaviour", "mask", "omega")],
    ("staleness", torch.zeros(5), "staleness: is of type Float"),
    ("recipe", Recipe(("ppo", ())), "surrogate: 'ppo' has no kernel; these have: reinforce, importance, ppo_clip"),
    ("recipe", Recipe(("ppo_clip", (0.2,))), "surrogate_args: ppo_clip takes 3, not 1"),
    ("recipe", Recipe(("reinforce", ()), ("is", ())), "correction: 'is' has no kernel"),
    ("recipe", Recipe(("reinforce", ()), ("tis", ())), "correction_args: tis takes 1, not 0"),
    ("recipe", Recipe(("reinforce", ()), divergence=("k4", ())), "divergence: 'k4' has no kernel"),
    ("recipe", Recipe(("reinforce", ()), entropy_coefficient=NAN), "entropy_coefficient: must be a number"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_argument_is_named(name: str, value: Any, message: str):
    takers = [function for function, arguments in ARGUMENTS.items() if name in arguments]
    assert takers
    for function in takers:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            call(function, KNOWN | {name: value})


def test_a_divergence_needs_a_reference():
    wrong = {"reference": None, "recipe": replace(CASE.recipe, divergence=("k3", (0.1, 0.0)))}
    with pytest.raises(ValueError, match="reference: the divergence needs it"):
        call(token_loss, KNOWN | wrong)


@pytest.mark.parametrize("logits", [torch.zeros(7).expand(5, 7), torch.zeros(7, 5).T, torch.zeros(11).unfold(0, 7, 1)])
def test_logits_are_not_overwritten_where_rows_overlap_or_are_scattered(logits: Tensor):
    with pytest.raises(ValueError, match="logits: rows"):
        token_loss_(logits, CASE.head[2], CASE.tokens, CASE.recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(OF_TOKENS - {"recipe", "num_bins", "moved"} | {"targets"}))
def test_a_tensor_of_another_device_is_named(name: str):
    near = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in KNOWN.items()}
    with pytest.raises(ValueError, match=f"{name}: is on cpu"):
        call(linear_token_loss, near | {name: KNOWN[name]})


TENSORS = st.builds(
    lambda shape, dtype, value, strided: (
        torch.full((*shape, 2), value).to(dtype)[..., 0] if strided else torch.full(shape, value).to(dtype)
    ),
    st.lists(st.sampled_from([0, 1, 5, 6, 7]), max_size=3).map(tuple),
    st.sampled_from(
        [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]
    ),
    st.sampled_from([0.0, 1.0, -1.0, 6.0, 1e9, NAN]),
    st.booleans(),
)
JUNK = st.none() | st.floats() | st.integers(-(2**63), 2**63 - 1) | TENSORS


@settings(max_examples=300, deadline=None)
@given(
    function=st.sampled_from(list(ARGUMENTS)),
    junk=st.dictionaries(st.sampled_from(sorted(KNOWN.keys() - {"recipe"})), JUNK, min_size=1, max_size=3),
    backward=st.booleans(),
)
def test_junk_is_refused_or_computed(function: Callable, junk: dict[str, Any], backward: bool):
    arguments = KNOWN | junk
    for name in ("logits", "hidden", "weight"):
        if isinstance(arguments[name], Tensor) and arguments[name].is_floating_point() and function is not token_loss_:
            arguments[name] = arguments[name].clone().requires_grad_(backward)
    try:
        first, *_ = call(function, arguments)
        if backward and first.requires_grad:
            first.sum().backward()
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return
    assert isinstance(first, Tensor)

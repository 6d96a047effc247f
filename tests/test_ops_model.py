"""The operations of a transformer's layer against plain torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention import Layout, attend_plain, families
from engine.ops import model as ops

F64 = torch.float64
LENGTHS, PREFIX = [5, 3, 0, 70, 1, 8], [-1, 0, 0, 0, -1, 4]
BOUNDS = np.cumsum([0, *LENGTHS])


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """What the operators leave unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype).requires_grad_()


def test_norm_and_rotation_by_hand():
    # mean(x^2) + eps = (9 + 16) / 2 + 12.5 = 25
    x = torch.tensor([[[3.0, 4.0]]])
    torch.testing.assert_close(ops.norm(x, torch.tensor([5.0, 10.0]), 12.5), torch.tensor([[[3.0, 8.0]]]))
    cos, sin = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, 3.0]])
    # (3 * 0.5 - 4 * 1, 4 * 2 + 3 * 3)
    torch.testing.assert_close(ops.norm(x, None, 0.0, cos, sin), torch.tensor([[[-2.5, 17.0]]]))


def test_swiglu_by_hand():
    gate, up = torch.tensor([[0.0, float(np.log(3.0)), -200.0, 200.0]]), torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    # log 3: 1 / (1 + 1/3) = 3/4
    expected = torch.tensor([[0.0, 3.0 * float(np.log(3.0)), 0.0, 400.0]])
    torch.testing.assert_close(ops.swiglu(gate, up), expected)


def attention_arguments(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Any, ...]:
    query, key, value = (
        drawn(int(BOUNDS[-1]), h, dim, seed=seed, dtype=dtype) for seed, h in enumerate((heads, kv_heads, kv_heads))
    )
    return query, key, value, ops.Families(*map(torch.from_numpy, (BOUNDS, *families(np.array(PREFIX)))))


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (100, 1)]),
    dim=st.integers(1, 40),
    num=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, F64]),
    seed=st.integers(0, 10),
)
@settings(max_examples=40, deadline=None)
def test_a_decoded_token_sees_what_its_slot_keeps_and_itself(heads, dim, num, dtype, seed):
    heads, kv_heads = heads
    context = 33
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(0, context, num))
    query, key, value = (drawn(num, h, dim, seed=seed + h, dtype=dtype).detach() for h in (heads, kv_heads, kv_heads))
    keys, values = (drawn(num + 1, kv_heads, context, dim, seed=seed + s, dtype=dtype).detach() for s in (5, 6))
    kept_keys, kept_values = keys.clone(), values.clone()
    out = ops.decode(query, key, value, keys, values, lengths, 0.3)
    for n, length in enumerate(lengths):
        kept_keys[n, :, length], kept_values[n, :, length] = key[n], value[n]
        k, v = (x[n, :, : length + 1].repeat_interleave(heads // kv_heads, 0) for x in (kept_keys, kept_values))
        weights = torch.softmax(0.3 * torch.einsum("hd,hkd->hk", query[n], k), -1)
        torch.testing.assert_close(out[n], torch.einsum("hk,hkd->hd", weights, v), rtol=1e-5, atol=1e-5)
    assert torch.equal(keys, kept_keys) and torch.equal(values, kept_values)


@pytest.mark.parametrize("dim", [3, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_attention_is_its_reference_in_values_and_gradients(dim, dtype):
    query, key, value, shared = attention_arguments(4, 2, dim, dtype)
    ours = ops.attention(query, key, value, shared, 0.3)
    theirs = attend_plain(query, key, value, Layout(BOUNDS, np.array(PREFIX)), 0.3)
    upstream = drawn(*ours.shape, dtype=dtype).detach()
    bound = 1e-12 if dtype == F64 else 2e-5
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    gradients = (torch.autograd.grad(out, (query, key, value), upstream) for out in (ours, theirs))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=10 * bound, atol=10 * bound)


def test_gradients_are_those_of_finite_differences_and_operators_are_well_formed():
    norm = (drawn(6, 2, 6), drawn(6), drawn(6, 6).detach(), drawn(6, 6, seed=1).detach(), 1e-3)
    layout = [torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3])]
    attention = (drawn(5, 2, 3), drawn(5, 1, 3), drawn(5, 1, 3, seed=1), *layout, 0.7)
    cases = {
        torch.ops.leeway.norm.default: [norm, (norm[0], None, *norm[2:]), (*norm[:2], None, None, 0.1)],
        torch.ops.leeway.swiglu.default: [(drawn(3, 5), drawn(3, 5, seed=1))],
        torch.ops.leeway.attention.default: [attention],
    }
    for operator, arguments in cases.items():
        for each in arguments:
            assert torch.autograd.gradcheck(lambda *a, op=operator: op(*a), each)
            torch.library.opcheck(operator, each)
    slots = drawn(3, 1, 4, 3).detach(), drawn(3, 1, 4, 3, seed=1).detach(), torch.tensor([0, 3])
    rows = (x.detach()[:2] for x in attention[:3])
    torch.library.opcheck(torch.ops.leeway.decode.default, (*rows, *slots, 0.5), test_utils=("test_schema",))


def test_no_bit_depends_on_the_number_of_threads():
    x, weight = drawn(700, 4, 24, dtype=torch.float32), drawn(24, dtype=torch.float32)

    def gradients(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        return torch.autograd.grad(ops.norm(x, weight, 1e-5).square().sum(), (x, weight))

    before = torch.get_num_threads()
    try:
        assert all(map(torch.equal, gradients(1), gradients(3)))
    finally:
        torch.set_num_threads(before)


def test_plain_instructions_compute_the_same():
    """What this process does not use, in one that does."""
    file = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(file), "-k", "hand or decoded or its_reference"]
    environment = {**os.environ, "LEEWAY_ISA": "portable"}
    done = subprocess.run(command, env=environment, cwd=file.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def attend(heads: int = 2, scale: float = 1.0, **layout: Tensor) -> None:
    query, key, value, shared = attention_arguments(heads, 2, 4, F64)
    ops.attention(query, key, value, shared._replace(**layout), scale)


def decode_lengths(*lengths: int) -> None:
    rows, slots = drawn(2, 1, 3), drawn(2, 1, 4, 3)
    ops.decode(rows, rows, rows, slots, slots, torch.tensor(lengths), 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.norm(drawn(2, 3), None), "x: has shape"),
        (lambda: ops.norm(drawn(2, 1, 4), drawn(3)), "weight: has shape"),
        (lambda: ops.norm(drawn(2, 1, 3), None, 0.0, drawn(2, 3), drawn(2, 3)), "x: rows of 3 numbers"),
        (lambda: ops.norm(drawn(2, 1, 4).half(), None), "x: is of type Half"),
        (lambda: ops.swiglu(drawn(2, 3), drawn(2, 4)), "up: has shape"),
        (lambda: ops.swiglu(drawn(2, 3), drawn(2, 3).float()), "up: is of type Float"),
        (lambda: attend(heads=3), "key: 2 heads do not divide"),
        (lambda: attend(scale=-1.0), "scale: must be above 0"),
        (lambda: attend(bounds=torch.tensor([0, 2])), "bounds: must rise from 0 to 6"),
        (lambda: attend(members=torch.tensor([0, 1, 2, 3, 4, 6])), "members: value 6 at row 5"),
        (lambda: attend(cu_seqlens=torch.tensor([0, 5, 3, 70, 71, 72, 87])), "cu_seqlens: must rise from 0 to 87"),
        (lambda: decode_lengths(0, 4), "lengths: value 4 at row 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message), torch.no_grad():
        call()

import math
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

from engine.ops import packing, reference

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32)


def bounds(lengths, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def scatter(lengths, generator) -> tuple[torch.Tensor, int]:
    """Places for sequences in a random order, with gaps, and the size of the axis that holds them."""
    starts, size = torch.zeros(len(lengths), dtype=torch.int64), 0
    for i in torch.randperm(len(lengths), generator=generator).tolist():
        size += int(torch.randint(0, 4, (), generator=generator))
        starts[i] = size
        size += lengths[i]
    return starts, size


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scan_arguments(lengths, seed, dtype=torch.float64) -> tuple[list[Any], dict[str, Any]]:
    random, num = draw(seed), sum(lengths)
    rewards, values = torch.randn(2, num, generator=random, dtype=dtype)
    mask = (torch.rand(num, generator=random) < 0.7).to(dtype)
    bootstrap, critic, policy = torch.rand(3, len(lengths), generator=random, dtype=dtype)
    return [rewards, values, mask, bounds(lengths), bootstrap], dict(
        gamma=0.97, lambda_critic=critic, lambda_policy=policy
    )


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SEEDS, st.sampled_from([torch.int32, torch.int64]))
def test_pack_and_unpack_equal_the_reference(lengths, seed, index):
    random = draw(seed)
    starts, size = scatter(lengths, random)
    dtypes = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.float64]
    streams = [torch.randint(0, 2, (size,), generator=random).to(dtype) for dtype in dtypes]
    packed = packing.pack(streams, starts, bounds(lengths, index))
    assert_equal(packed, reference.pack(streams, starts, bounds(lengths)))
    loose = packing.unpack(packed, starts, bounds(lengths, index), size, 7)
    assert_equal(loose, reference.unpack(packed, starts, bounds(lengths), size, 7))
    assert_equal(packing.pack(loose, starts, bounds(lengths)), packed)


def assert_equal(ours, expected):
    assert [each.dtype for each in ours] == [each.dtype for each in expected]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_padded_rows_to_packed_and_back():
    rows = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]])
    order = torch.tensor([2, 0, 1])
    cu_seqlens = bounds([2, 3, 1])
    (packed,) = packing.pack([rows], order * 4, cu_seqlens)
    assert packed.tolist() == [5, 6, 1, 2, 3, 4]
    loose, halves = packing.unpack([packed, packed / 2], order * 4, cu_seqlens, 12, [-100, math.nan])
    assert loose.view(3, 4).tolist() == [[1, 2, 3, -100], [4, -100, -100, -100], [5, 6, -100, -100]]
    assert halves[4] == 2 and halves[5].isnan()


def test_streams_beyond_one_launch_and_long_enough_for_all_threads():
    cu_seqlens, starts = bounds([40000, 1, 30000]), torch.tensor([30001, 30000, 0])
    streams = [torch.arange(70001) + i for i in range(20)]
    packed = packing.pack(streams, starts, cu_seqlens)
    assert_equal(packed, reference.pack(streams, starts, cu_seqlens))
    assert_equal(packing.unpack(packed, starts, cu_seqlens, 70001), streams)


def test_no_tokens_no_sequences():
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert packing.pack([nothing], none, bounds([]))[0].tolist() == []
    assert packing.unpack([nothing], none, bounds([]), 2, 5)[0].tolist() == [5, 5]
    assert packing.unpack([nothing], torch.tensor([1, 1]), bounds([0, 0]), 2, 5)[0].tolist() == [5, 5]
    assert packing.segment_sum(nothing, bounds([0, 0])).tolist() == [0, 0]
    advantages, returns = packing.gae(
        nothing, nothing, None, bounds([]), None, gamma=1, lambda_critic=nothing, lambda_policy=nothing
    )
    assert advantages.tolist() == returns.tolist() == []


def test_token_layout_worked_by_hand():
    tokens = torch.tensor([10, 11, 20, 21, 30, 40, 41])
    layout = packing.token_layout(tokens, torch.tensor([2, 1, 0]), bounds([4, 1, 2]))
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert layout.labels.tolist() == [-100, 20, 21, -100, -100, 41, -100]
    assert layout.mask.tolist() == [0, 1, 1, 0, 0, 1, 0]
    assert layout.sequence.tolist() == [0, 0, 0, 0, 1, 2, 2]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SEEDS)
def test_token_layout_equals_the_reference(lengths, seed):
    tokens = torch.randint(0, 99, (sum(lengths),), generator=draw(seed))
    prompts = torch.randint(0, 14, (len(lengths),), generator=draw(seed))
    assert_equal(
        packing.token_layout(tokens, prompts, bounds(lengths)), reference.token_layout(tokens, prompts, bounds(lengths))
    )


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SEEDS, st.sampled_from(["sum", "mean", "max"]), st.booleans(), st.sampled_from([1e-6, 1e-14]))
def test_reductions_equal_the_reference(lengths, seed, reduction, masked, rounding):
    dtype = torch.float32 if rounding == 1e-6 else torch.float64
    values = torch.randn(sum(lengths), generator=draw(seed), dtype=dtype)
    mask = (torch.rand(sum(lengths), generator=draw(seed + 1)) < 0.5).to(dtype) if masked else None
    ours = getattr(packing, f"segment_{reduction}")(values, bounds(lengths), mask)
    expected = getattr(reference, f"segment_{reduction}")(
        values.double(), bounds(lengths), None if mask is None else mask.double()
    )
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=rounding, atol=rounding)


def test_reductions_are_those_of_the_algorithms():
    from engine.algorithms.segments import Segments

    lengths = [3, 0, 5, 1]
    values, mask = torch.randn(9, dtype=torch.float64), torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0, 1]).double()
    segments = Segments(torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)), mask, 4)
    torch.testing.assert_close(packing.segment_sum(values, bounds(lengths), mask), segments.sum(values))
    torch.testing.assert_close(packing.segment_mean(values, bounds(lengths), mask), segments.mean(values))


def test_not_a_number_is_the_greatest_where_it_counts():
    values, mask = torch.tensor([1.0, math.nan, 3.0, math.nan]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert packing.segment_max(values, bounds([3, 1])).isnan().all()
    assert packing.segment_max(values, bounds([3, 1]), mask)[0] == 3
    assert packing.segment_sum(values, bounds([3, 1]), mask)[0] == 4


@pytest.mark.parametrize("reduce", [packing.segment_sum, packing.segment_mean])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_reductions(reduce, masked):
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 1, 1], dtype=torch.float64) if masked else None
    assert torch.autograd.gradcheck(lambda x: reduce(x, bounds([3, 0, 2, 4]), mask), values)
    assert torch.autograd.gradgradcheck(lambda x: reduce(x, bounds([3, 0, 2, 4]), mask), values)


def test_a_gradient_that_is_not_contiguous():
    values = torch.randn(4, requires_grad=True)
    packing.segment_sum(values, bounds([1, 3])).sum().backward()  # the gradient of a sum is one expanded number
    assert values.grad is not None and values.grad.tolist() == [1, 1, 1, 1]


def test_the_greatest_has_no_gradient():
    values = torch.randn(4, requires_grad=True)
    assert not packing.segment_max(values, bounds([4])).requires_grad
    with pytest.raises(RuntimeError, match="'max' has no gradient"):
        torch.ops.leeway.segment_reduce(values, None, bounds([4]), "max")[0].sum().backward()


def test_advantages_worked_by_hand():
    # gamma 1/2, lambda 1 and 0; the observation in the middle passes the last token's A and V on.
    rewards, values = torch.tensor([1.0, 99.0, 2.0]), torch.tensor([3.0, 50.0, 4.0])
    lambda_critic, lambda_policy = torch.ones(1), torch.zeros(1)
    advantages, returns = packing.gae(
        rewards, values, torch.tensor([1.0, 0.0, 1.0]), bounds([3]), torch.tensor([8.0]),
        gamma=0.5, lambda_critic=lambda_critic, lambda_policy=lambda_policy,
    )  # fmt: skip
    last = 2 + 0.5 * 8 - 4
    first = 1 + 0.5 * 4 - 3
    assert advantages.tolist() == [first, last, last]
    assert returns.tolist() == [first + 0.5 * last + 3, last + 50, last + 4]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SEEDS, st.booleans(), st.booleans())
def test_advantages_equal_the_loop_over_time(lengths, seed, masked, bootstrapped):
    arguments, options = scan_arguments(lengths, seed)
    arguments[2] = arguments[2] if masked else None
    arguments[4] = arguments[4] if bootstrapped else None
    expected = reference.gae(*arguments, **options)
    torch.testing.assert_close(packing.gae(*arguments, **options), expected, rtol=1e-13, atol=1e-13)
    single = [each.float() if torch.is_tensor(each) and each.is_floating_point() else each for each in arguments]
    ours = packing.gae(*single, **{k: v.float() if torch.is_tensor(v) else v for k, v in options.items()})
    assert ours[0].dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close([each.double() for each in ours], list(expected), rtol=1e-5, atol=1e-5)


def test_advantages_of_long_sequences_in_float32():
    """Sums of 20,000 surprises at lambda 1: kept in float64, they lose no more than their last rounding."""
    arguments, options = scan_arguments([20000, 3], 0)
    options |= dict(gamma=1.0, lambda_critic=torch.ones(2).double(), lambda_policy=torch.ones(2).double())
    single = [each.float() if torch.is_tensor(each) and each.is_floating_point() else each for each in arguments]
    rounded = [each.double() if torch.is_tensor(each) and each.is_floating_point() else each for each in single]
    ours = packing.gae(*single, **{k: v.float() if torch.is_tensor(v) else v for k, v in options.items()})
    expected = packing.gae(*rounded, **options)
    torch.testing.assert_close([each.double() for each in ours], list(expected), rtol=1e-7, atol=1e-5)


def test_a_lambda_for_each_length():
    """VAPO, arXiv:2504.05118: the policy's lambda is 1 - 1 / (alpha * length), the critic's 1."""
    lengths = torch.tensor([2, 40, 500])
    (rewards, values, mask, cu_seqlens, bootstrap), _ = scan_arguments(lengths.tolist(), 1)
    one, policy = torch.ones(3).double(), 1 - 1 / (0.05 * lengths).double().clamp(1)
    advantages, returns = packing.gae(
        rewards, values, mask, cu_seqlens, bootstrap, gamma=1.0, lambda_critic=one, lambda_policy=policy
    )
    for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        expected = reference.gae(
            rewards[begin:end], values[begin:end], mask[begin:end], bounds([end - begin]), bootstrap[i : i + 1],
            gamma=1.0, lambda_critic=one[:1], lambda_policy=policy[i : i + 1],
        )  # fmt: skip
        torch.testing.assert_close((advantages[begin:end], returns[begin:end]), expected, rtol=1e-12, atol=1e-12)


def test_the_same_bits_on_any_number_of_threads():
    lengths = torch.randint(0, 3000, (64,), generator=draw(0)).tolist()
    arguments, options = scan_arguments(lengths, 0, torch.float32)
    starts, size = scatter(lengths, draw(1))

    def run():
        loose = packing.unpack([arguments[0]], starts, arguments[3], size)
        sums = packing.segment_sum(arguments[0], arguments[3])
        return [*packing.gae(*arguments, **options), *loose, *packing.pack(loose, starts, arguments[3]), sums]

    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    assert_equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_well_behaved(dtype):
    ops, cu = torch.ops.leeway, bounds([3, 0, 2])
    values, starts, mask = torch.randn(5, dtype=dtype), torch.tensor([4, 0, 1]), torch.ones(5, dtype=dtype)
    lambdas = torch.rand(3, dtype=dtype)
    opcheck(ops.pack.default, ([torch.randn(8, dtype=dtype), torch.arange(8)], starts, cu, 5))
    opcheck(ops.unpack.default, ([values, torch.arange(5)], starts, cu, 8, [0.5, -100.0]))
    opcheck(ops.token_layout.default, (torch.arange(5), torch.tensor([1, 0, 2]), cu))
    opcheck(ops.gae.default, (values, values, mask, cu, lambdas, 0.9, lambdas, lambdas))
    for reduction in ("sum", "mean"):
        opcheck(ops.segment_reduce.default, (values.clone().requires_grad_(), mask, cu, reduction))
    opcheck(ops.segment_spread.default, (lambdas.clone().requires_grad_(), mask, cu, 5))


def test_operators_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def packed_means(rows: torch.Tensor, starts: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        (packed,) = packing.pack([rows.detach()], starts, cu_seqlens, 5)
        return packing.segment_mean(packed * rows.view(-1)[:5], cu_seqlens)

    rows = torch.arange(8.0).view(2, 4).requires_grad_()
    means = packed_means(rows, torch.tensor([4, 0]), bounds([2, 3]))
    means.sum().backward()
    assert means.tolist() == pytest.approx([(4 * 0 + 5 * 1) / 2, (0 * 2 + 1 * 3 + 2 * 4) / 3])
    assert rows.grad is not None and rows.grad.view(-1)[:5].tolist() == pytest.approx([2, 2.5, 0, 1 / 3, 2 / 3])


CALLS = {
    "pack": lambda a: torch.ops.leeway.pack([a["streams"]], a["starts"], a["cu_seqlens"], 5),
    "unpack": lambda a: torch.ops.leeway.unpack([a["values"]], a["starts"], a["cu_seqlens"], a["size"], a["fill"]),
    "token_layout": lambda a: packing.token_layout(a["tokens"], a["prompt_lengths"], a["cu_seqlens"]),
    "segment_sum": lambda a: packing.segment_sum(a["values"], a["cu_seqlens"], a["mask"]),
    "segment_spread": lambda a: torch.ops.leeway.segment_spread(a["lambda_policy"], a["mask"], a["cu_seqlens"], 5),
    "gae": lambda a: torch.ops.leeway.gae(
        a["rewards"],
        a["values"],
        a["mask"],
        a["cu_seqlens"],
        a["bootstrap"],
        1.0,
        a["lambda_critic"],
        a["lambda_policy"],
    ),
}


def good() -> dict[str, Any]:
    rows = {name: torch.zeros(5) for name in ("values", "rewards", "mask")}
    sequences = {name: torch.zeros(2) for name in ("bootstrap", "lambda_critic", "lambda_policy")}
    whole = {"starts": torch.tensor([4, 0]), "tokens": torch.arange(5), "prompt_lengths": torch.tensor([1, 1])}
    other = {"streams": torch.zeros(8), "cu_seqlens": bounds([2, 3]), "size": 8, "fill": [0.0]}
    return rows | sequences | whole | other


@pytest.mark.parametrize("call", CALLS)
def test_good_arguments_are_taken(call):
    CALLS[call](good())


@pytest.mark.parametrize(
    ("call", "name", "value", "message"),
    [
        ("pack", "cu_seqlens", torch.tensor([1, 2, 5]), "cu_seqlens: begins with 1, not with 0"),
        ("pack", "cu_seqlens", torch.tensor([0, 6, 5]), "cu_seqlens: falls from 6 to 5 at sequence 1"),
        ("pack", "cu_seqlens", torch.tensor([0, 2, 6]), "cu_seqlens: ends with 6 where there are 5 tokens"),
        ("pack", "cu_seqlens", torch.tensor([0, 2, 2**32 + 5]), "cu_seqlens: ends with 4294967301"),
        ("pack", "cu_seqlens", torch.tensor([0.0, 2, 5]), "cu_seqlens: is of type Float where Int is needed"),
        ("pack", "cu_seqlens", torch.tensor([[0, 2, 5]]), r"cu_seqlens: has shape \[1, 3\] where \[S \+ 1\]"),
        ("pack", "cu_seqlens", torch.zeros(0, dtype=torch.int32), "cu_seqlens: has shape"),
        ("pack", "cu_seqlens", torch.tensor([0, 9, 2, 9, 5])[::2], "cu_seqlens: must be contiguous"),
        ("pack", "starts", torch.tensor([7, 0]), "starts: sequence 0, of 2 tokens from 7 on, does not lie within 0..8"),
        ("pack", "starts", torch.tensor([0, -1]), "starts: sequence 1, of 3 tokens from -1 on"),
        ("pack", "starts", torch.tensor([0, 2**63 - 1]), "starts: sequence 1"),
        ("pack", "starts", torch.tensor([0]), r"starts: has shape \[1\] where \[2\] is needed"),
        ("pack", "starts", torch.tensor([0, 0], dtype=torch.int32), "starts: is of type Int where Long is needed"),
        (
            "pack",
            "streams",
            torch.zeros(8, dtype=torch.complex128),
            r"streams\[0\]: is of type ComplexDouble, 16 bytes",
        ),
        ("pack", "streams", torch.zeros(4, 4)[:, :2], r"streams\[0\]: must be contiguous"),
        ("unpack", "starts", torch.tensor([1, 2]), "starts: sequences 0 and 1 overlap"),
        ("unpack", "size", 5, "starts: sequence 0, of 2 tokens from 4 on, does not lie within 0..5"),
        ("unpack", "size", -1, "size: -1 is below 0"),
        ("unpack", "fill", [0.0, 1.0], "fill: has 2 values for 1 streams"),
        ("token_layout", "tokens", torch.arange(5).int(), "tokens: is of type Int where Long is needed"),
        ("token_layout", "tokens", torch.arange(4), "cu_seqlens: ends with 5 where there are 4 tokens"),
        ("token_layout", "prompt_lengths", torch.tensor([1, 1, 1]), "prompt_lengths: has shape"),
        ("segment_sum", "values", torch.zeros(5).half(), "values: is of type Half where float32 or float64 is needed"),
        ("segment_sum", "mask", torch.zeros(5).double(), "mask: is of type Double where Float is needed"),
        ("segment_sum", "mask", torch.zeros(10)[::2], "mask: must be contiguous"),
        ("segment_spread", "mask", torch.zeros(4), r"mask: has shape \[4\] where \[5\] is needed"),
        ("gae", "values", torch.zeros(4), r"values: has shape \[4\] where \[5\] is needed"),
        ("gae", "rewards", torch.zeros(5, 1), r"rewards: has shape \[5, 1\] where \[N\] is needed"),
        ("gae", "bootstrap", torch.zeros(3), r"bootstrap: has shape \[3\] where \[2\] is needed"),
        ("gae", "lambda_critic", torch.zeros(2).double(), "lambda_critic: is of type Double where Float is needed"),
        ("gae", "lambda_policy", torch.zeros(1), "lambda_policy: has shape"),
    ],
)
def test_bad_input_names_the_argument(call, name, value, message):
    with pytest.raises(ValueError, match=message):
        CALLS[call](good() | {name: value})


def test_bad_input_of_the_operators_themselves():
    with pytest.raises(ValueError, match="streams: are none"):
        packing.pack([], torch.tensor([0]), bounds([1]))
    with pytest.raises(ValueError, match=r"streams\[1\]: has 7 elements, streams\[0\] 8"):
        packing.pack([torch.zeros(8), torch.zeros(7)], torch.tensor([0]), bounds([1]))
    with pytest.raises(ValueError, match="num_tokens: -1 is not from 0 to"):
        packing.pack([torch.zeros(8)], torch.tensor([0]), bounds([1]), -1)
    with pytest.raises(ValueError, match="reduction: 'median' is none of sum, mean, max"):
        torch.ops.leeway.segment_reduce(torch.zeros(1), None, bounds([1]), "median")


@pytest.mark.gpu
def test_cuda_equals_the_cpu():
    lengths = torch.randint(0, 5000, (300,), generator=draw(0)).tolist()
    arguments, options = scan_arguments(lengths, 0, torch.float32)
    starts, size = scatter(lengths, draw(1))
    prompts = torch.randint(0, 900, (300,), generator=draw(2))

    def run(device):
        rewards, values, mask, cu_seqlens, bootstrap = (each.to(device) for each in arguments)
        each: dict[str, Any] = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
        integers = torch.arange(len(values), device=device)
        loose = packing.unpack([values, integers, mask.bool()], starts.to(device), cu_seqlens, size, [0.5, -100, 1])
        results = [*loose, *packing.pack(loose, starts.to(device), cu_seqlens)]
        results += packing.token_layout(integers, prompts.to(device), cu_seqlens)
        results += [getattr(packing, f"segment_{name}")(values, cu_seqlens, mask) for name in ("sum", "mean", "max")]
        return [*results, *packing.gae(rewards, values, mask, cu_seqlens, bootstrap, **each)]

    ours = run("cuda")
    torch.testing.assert_close([each.cpu() for each in ours], run("cpu"), rtol=1e-5, atol=1e-5)
    assert_equal(ours, run("cuda"))
    with pytest.raises(ValueError, match="mask: is on cpu, other arguments on cuda"):
        packing.segment_sum(torch.zeros(5, device="cuda"), bounds([5]).cuda(), torch.zeros(5))


WILD = st.one_of(st.integers(-3, 12), st.integers(-(2**63), 2**63 - 1))


@st.composite
def wild_tensor(draw):
    dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.int32, torch.float32, torch.float64, torch.bool]))
    numbers = draw(st.lists(WILD, max_size=6))
    if dtype == torch.int32:
        numbers = [number % 2**31 for number in numbers]
    tensor = torch.tensor(numbers, dtype=torch.int64).to(dtype)
    return draw(st.sampled_from([tensor, tensor[::2], tensor.view(1, -1), tensor[:0]]))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(CALLS)), st.dictionaries(st.sampled_from(list(good())), wild_tensor(), min_size=1, max_size=3)
)
def test_anything_gives_an_exception_or_a_result(call, wild):
    arguments = good() | {name: value for name, value in wild.items() if name not in ("size", "fill")}
    try:
        CALLS[call](arguments)
    except ValueError as error:
        names = [*arguments, "streams[0]", "num_tokens"]
        assert str(error).split(":")[0] in names, error

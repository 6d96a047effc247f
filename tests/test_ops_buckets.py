"""Buckets, checksums and deltas on the CPU. tests/driver/sync.cpp holds the kernels of all devices to plain loops."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.ops.buckets import (
    ALIGNMENT,
    BLOCK_UNITS,
    Delta,
    apply_delta,
    checksum,
    flatten,
    flatten_delta,
    span,
    wire_dtype,
)

BF16, F32, F64, FP8 = torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn


def laid_out(tensors: list[Tensor], dtypes: list[torch.dtype], gap: int = 0) -> tuple[list[int], int]:
    """Offsets one after the other with `gap` * 16 bytes between, and the size of the bucket."""
    offsets, end = [], 0
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        offsets.append(end)
        end += -(-span(tensor.shape, dtype) // ALIGNMENT + -gap) * ALIGNMENT
    return offsets, end


def flattened(tensors: list[Tensor], dtypes: list[torch.dtype], gap: int = 0) -> tuple[Tensor, list[int], int]:
    offsets, size = laid_out(tensors, dtypes, gap)
    bucket = torch.full((size,), 0xEE, dtype=torch.uint8)
    return bucket, offsets, int(flatten(tensors, bucket, offsets, dtypes))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    bucket, _, _ = flattened([tensor], [dtype])
    return bucket[: tensor.numel() * dtype.itemsize].view(dtype).view(tensor.shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def awkward(dtype: torch.dtype, count: int = 100_003) -> Tensor:
    """Numbers of every magnitude, ties, infinities and subnormals, and weights as they are."""
    any_bits = torch.frombuffer(bytearray(random.Random(1).randbytes(4 * count)), dtype=F32)
    ties = (torch.arange(-30_000, 30_000, dtype=torch.int32) * 0x8000 + 0x8000).view(F32)
    usual = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38, -1e-45, 65504.0, 1.0])
    return torch.cat([any_bits, ties, usual, edges]).to(dtype)


@pytest.mark.parametrize("source", [F32, F64, BF16])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_casts_are_torchs(source: torch.dtype, dtype: torch.dtype) -> None:
    given = awkward(source)
    if source == F64:
        given[-5000:] *= 1 + torch.rand(5000, dtype=F64) * 1e-8  # not all of them floats already
    made, expected = cast(given, dtype), given.to(dtype)
    nan = given.isnan()
    assert torch.equal(made.isnan(), nan) and nan.sum() > 100
    assert torch.equal(bits(made[~nan]), bits(expected[~nan]))


def test_what_has_its_dtype_is_copied() -> None:
    given = [
        torch.arange(7),
        torch.tensor(True),
        torch.empty(0, 4),
        awkward(BF16),
        torch.tensor(2.5, dtype=torch.float16),
    ]
    bucket, offsets, _ = flattened(given, [tensor.dtype for tensor in given])
    for tensor, offset in zip(given, offsets, strict=True):
        assert torch.equal(bucket[offset : offset + tensor.nbytes], bits(tensor.reshape(-1)))


def test_other_casts_are_left_to_torch() -> None:
    given = [torch.arange(7), torch.randn(9, dtype=torch.float16), torch.randn(9), torch.randn(3, 5).half()]
    dtypes = [BF16, F32, torch.float16, FP8]
    bucket, offsets, _ = flattened(given, dtypes)
    for tensor, offset, dtype in zip(given[:3], offsets, dtypes, strict=False):
        assert torch.equal(bucket[offset : offset + span(tensor.shape, dtype)], bits(tensor.to(dtype)))
    assert torch.equal(bucket[offsets[3] :], flattened([given[3].float()], [FP8])[0])


def test_gaps_are_zero() -> None:
    given = [torch.full((n,), -1.0) for n in (5, 0, 8, 65_537)]
    bucket, offsets, total = flattened(given, [BF16] * 4, gap=3)
    for tensor, offset, end in zip(given, offsets, [*offsets[1:], len(bucket)], strict=True):
        filled = offset + 2 * tensor.numel()
        assert bucket[offset:filled].all() and not bucket[filled:end].any()
    assert total == int(checksum(bucket))


# ---- fp8


def reference_fp8(given: Tensor) -> tuple[Tensor, Tensor]:
    """Elements and scales of a matrix by plain torch."""
    rows, columns = given.shape
    down, across = -(-rows // 128), -(-columns // 128)
    finite = torch.zeros(down * 128, across * 128)
    finite[:rows, :columns] = given.float().nan_to_num(0, 0, 0).abs()
    top = finite.view(down, 128, across, 128).amax((1, 3))
    scales = torch.where(top / 448 < torch.finfo(F32).tiny, 1.0, top / 448)
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return (given.float() / spread).clamp(-448, 448).masked_fill(given.isinf(), float("nan")).to(FP8), scales


def fp8_of(given: Tensor) -> tuple[Tensor, Tensor]:
    bucket, _, _ = flattened([given], [FP8])
    scales_at = -(-given.numel() // ALIGNMENT) * ALIGNMENT
    shape = [-(-size // 128) for size in given.shape]
    return bucket[: given.numel()].view(FP8).view(given.shape), bucket[scales_at:][: 4 * np.prod(shape)].view(F32).view(
        shape
    )


@pytest.mark.parametrize("source", [F32, F64, BF16])
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (200, 300), (129, 17), (3, 1000), (300, 144)])
def test_fp8_matrices_have_a_scale_a_tile(source: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()).to(source)
    elements, scales = fp8_of(given)
    expected, expected_scales = reference_fp8(given)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(bits(elements), bits(expected))
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    error = (elements.float() * spread - given.float()).abs()
    assert (error <= given.float().abs() / 16 + spread * 2**-10).all()


def test_fp8_rounds_as_torch_does() -> None:
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    inf = torch.full_like(halfway, float("inf"))
    positive = torch.cat([numbers, halfway, halfway.nextafter(inf), halfway.nextafter(-inf), torch.rand(99) * 448])
    given = torch.cat([positive, -positive]).reshape(-1, 1).repeat(1, 2)
    given[:, 1] = 448  # so that every scale is 1
    elements, scales = fp8_of(given)
    assert (scales == 1).all()
    assert torch.equal(bits(elements), bits(given.to(FP8)))


def test_fp8_of_what_is_no_number() -> None:
    given = torch.zeros(256, 128)
    given[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 2.0])
    given[130, 5] = 1e-42  # too small for a normal scale
    elements, scales = fp8_of(given)
    assert scales.flatten().tolist() == [np.float32(2) / np.float32(448), 1.0]
    assert elements[0, :3].isnan().all() and elements[0, 3] == 448 and not elements.view(torch.uint8)[1:].any()


def test_only_matrices_become_fp8() -> None:
    given = torch.randn(9)
    assert wire_dtype((9,), FP8) == BF16 and wire_dtype((3, 3), FP8) == FP8 and span((9,), FP8) == 18
    bucket, _, _ = flattened([given], [FP8])
    assert torch.equal(bucket[:18].view(BF16), given.bfloat16())
    assert span((129, 256), FP8) == 129 * 256 + 4 * 4


def test_threads_change_no_bit() -> None:
    given = [torch.randn(3_000_001), torch.randn(1000, 2001)]
    made = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            made.append(flattened(given, [BF16, FP8]))
            assert int(checksum(made[-1][0])) == made[-1][2]
        finally:
            torch.set_num_threads(before)
    assert torch.equal(made[0][0], made[1][0]) and made[0][2] == made[1][2]


# ---- Deltas


def pairs_of_versions() -> st.SearchStrategy[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Two versions of the same tensors: float32 bit patterns, of which none, some or all differ."""

    @st.composite
    def pair(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
        generator = np.random.default_rng(draw(st.integers(0, 2**32)))
        sizes = draw(st.lists(st.integers(0, 300) | st.just(70_000), max_size=4))
        special = np.array([0, 0x80000000, 0x7FC00000, 0x7FC10000, 0xFFC00000, 0x7F800000, 0x7F810000], np.uint32)
        before = [generator.choice(special, n) if n % 2 else generator.integers(0, 2**32, n, np.uint32) for n in sizes]
        share = draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
        after = []
        for bits_before in before:
            changed = generator.random(bits_before.shape) < share
            others = np.where(
                generator.random(bits_before.shape) < 0.5,
                bits_before ^ np.uint32(1 << 31),
                generator.permutation(bits_before),
            )
            after.append(np.where(changed, others, bits_before))
        return before, after

    return pair()


@settings(max_examples=60, deadline=None)
@given(pairs_of_versions(), st.sampled_from([BF16, F32]), st.integers(0, 3))
def test_deltas_lose_nothing(versions: tuple, dtype: torch.dtype, gap: int) -> None:
    before, after = ([torch.from_numpy(each).view(F32) for each in version] for version in versions)
    dtypes = [dtype] * len(before)
    old, offsets, old_sum = flattened(before, dtypes, gap)
    new, _, new_sum = flattened(after, dtypes, gap)
    shadow = old.clone()
    total, delta = flatten_delta(after, shadow, offsets, dtypes)
    assert torch.equal(shadow, new) and int(total) == new_sum

    units = (old.view(torch.int16) != new.view(torch.int16)).nonzero().flatten()
    blocks = -(-len(new) // (2 * BLOCK_UNITS))
    assert len(delta.trim().offsets) == len(delta.offsets) == int(delta.counts.sum())
    assert delta.counts.tolist() == torch.bincount(units // BLOCK_UNITS, minlength=blocks).tolist()[:blocks]
    assert torch.equal(delta.offsets.long(), units % BLOCK_UNITS)
    assert torch.equal(delta.values.view(torch.int16), new.view(torch.int16)[units])

    grown = apply_delta(old, delta)
    assert torch.equal(old, new) and int(grown + old_sum) == new_sum
    assert int(apply_delta(old, delta)) == 0 and torch.equal(old, new)  # written over, so twice is as good as once


def test_deltas_of_pieces() -> None:
    given = [torch.randn(500), torch.randn(70_000)]
    bucket, offsets, total = flattened(given, [BF16] * 2)
    pieces = [bucket[: offsets[1]].clone(), bucket[offsets[1] :].clone()]
    sums = [
        flatten_delta([t + 1], piece, [0], [BF16], at)[0] for t, piece, at in zip(given, pieces, offsets, strict=True)
    ]
    assert int(sum(sums, start=torch.tensor(0))) == flattened([t + 1 for t in given], [BF16] * 2)[2]


def test_a_delta_of_fp8_matrices() -> None:
    given = torch.randn(300, 200)
    shadow, offsets, _ = flattened([given], [FP8])
    old = shadow.clone()
    given[5, 7] = 9  # the greatest of its tile: others have another scale
    total, delta = flatten_delta([given], shadow, offsets, [FP8])
    expected, _, expected_sum = flattened([given], [FP8])
    assert torch.equal(shadow, expected) and int(total) == expected_sum and len(delta.offsets) < 128 * 128
    apply_delta(old, delta)
    assert torch.equal(old, expected)


def test_too_little_room_is_told() -> None:
    given = torch.randn(1000)
    shadow, offsets, _ = flattened([torch.zeros(1000)], [BF16])
    total, delta = flatten_delta([given], shadow, offsets, [BF16], capacity=999)
    assert torch.equal(shadow[:2000].view(BF16), given.bfloat16()) and int(total) == int(checksum(shadow))
    with pytest.raises(OverflowError, match="1000 changes, but room for 999"):
        delta.trim()


# ---- What is refused


def bucket_of(size: int = 256) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bucket": torch.zeros(256)}, "bucket: Float"),
        ({"bucket": bucket_of().view(16, 16)}, "bucket: must be one-dim"),
        ({"bucket": bucket_of(512)[::2]}, "bucket: must be .* contiguous"),
        ({"bucket": bucket_of(300)[8:]}, "bucket: its memory"),
        ({"bucket": bucket_of(48)}, r"bucket: 48 bytes, but tensors\[1\] ends at 56"),
        ({"offsets": [0]}, "offsets: 1 for 2 tensors"),
        ({"offsets": [0, 24]}, r"offsets\[1\]: 24 is no multiple of 16"),
        ({"offsets": [0, 0]}, r"offsets\[1\]: 0 is not between 20"),
        ({"offsets": [48, 0]}, r"offsets\[1\]: 0 is not between 68"),
        ({"offsets": [-16, 32]}, r"offsets\[0\]: -16 is not between 0"),
        ({"offsets": [0, 2**62]}, r"offsets\[1\]: 4611686018427387904 is not between"),
        ({"dtypes": [BF16]}, "dtypes: 1 for 2 tensors"),
        ({"tensors": [torch.zeros(20)[::2], torch.zeros(4)]}, r"tensors\[0\]: must be contiguous"),
        ({"tensors": [torch.zeros(10), torch.zeros(4, device="meta")]}, "tensors|meta"),
        ({"tensors": [torch.zeros(10).to_sparse(), torch.zeros(4)]}, "."),
        ({"position": 4}, "position: 4"),
        ({"position": -8}, "position: -8"),
    ],
)
@pytest.mark.parametrize("op", [flatten, flatten_delta])
def test_wrong_buckets_are_named(op, arguments: dict, message: str) -> None:
    right = {
        "tensors": [torch.zeros(10), torch.zeros(4)],
        "bucket": bucket_of(),
        "offsets": [0, 48],
        "dtypes": [BF16, BF16],
    }
    given = {**right, **arguments}
    if op is flatten_delta:
        given["shadow"] = given.pop("bucket")
        message = message.replace("bucket", "(shadow|bucket)")
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        op(**given)


def test_a_bucket_may_not_hold_its_tensors() -> None:
    bucket = bucket_of()
    with pytest.raises(ValueError, match=r"tensors\[0\]: shares memory"):
        flatten([bucket[128:].view(F32)], bucket, [0], [BF16])


def test_wrong_formats_are_named() -> None:
    for formats, error in (
        ([7], r"formats\[0\]: there is no format 7"),
        ([-1], r"no format -1"),
        ([3], "only matrices"),
        ([], "formats: 0"),
    ):
        with pytest.raises(ValueError, match=error):
            torch.ops.leeway.flatten_([torch.zeros(4)], bucket_of(), [0], formats, 0)


def changes(counts: list[int], offsets: list[int]) -> Delta:
    units = torch.tensor(offsets, dtype=torch.int32).to(torch.uint16)
    return Delta(torch.tensor(counts, dtype=torch.int32), units, torch.ones(len(offsets), dtype=torch.uint16))


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (changes([1], [0]), "counts: 1 for a bucket of 2 blocks"),
        (changes([1, 2], [0, 5]), "counts: 3 changes in all, but 2 offsets"),
        (changes([0, 1], [0, 5]), "counts: 1 changes in all, but 2 offsets"),
        (changes([-1, 3], [0, 5]), r"counts\[0\]: -1 is not between"),
        (changes([2**31 - 1, 2], [0, 5]), r"counts\[0\]: 2147483647 is not between"),
        (changes([1, 1], [0, 50]), r"offsets\[1\]: 50 is outside"),
        (changes([2, 0], [7, 7]), r"offsets\[1\]: 7 is .* not above"),
        (changes([2, 0], [7, 3]), r"offsets\[1\]: 3 is .* not above"),
        (Delta(torch.tensor([1, 0]), *2 * [torch.zeros(1, dtype=torch.uint16)]), "counts: Long, expected Int"),
        (Delta(torch.tensor([1, 0]).int(), torch.zeros(1), torch.zeros(1, dtype=torch.uint16)), "offsets: Float"),
        (Delta(torch.tensor([1, 0]).int(), *(torch.zeros(n, dtype=torch.uint16) for n in (1, 2))), "values: 2 for 1"),
        (Delta(torch.tensor([1, 0]).int(), torch.zeros(1, dtype=torch.uint16), torch.zeros(1)), "values: Float"),
    ],
)
def test_deltas_that_do_not_fit_change_nothing(delta: Delta, message: str) -> None:
    bucket = bucket_of(2 * BLOCK_UNITS + 100)
    with pytest.raises((ValueError, TypeError), match=message):
        apply_delta(bucket, delta)
    assert not bucket.any()


def test_deltas_are_of_whole_units() -> None:
    with pytest.raises(ValueError, match="shadow: 33 bytes"):
        flatten_delta([], bucket_of(33), [], [])
    with pytest.raises(ValueError, match="bucket: 33 bytes"):
        apply_delta(bucket_of(33), changes([0], []))
    with pytest.raises(ValueError, match="capacity: -1"):
        flatten_delta([], bucket_of(32), [], [], capacity=-1)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 3), max_size=4),
    st.lists(st.integers(0, 65535), max_size=6),
    st.integers(0, 70_000),
)
def test_no_delta_crashes(counts: list[int], offsets: list[int], size: int) -> None:
    bucket = bucket_of(2 * size)
    try:
        apply_delta(bucket, changes(counts, offsets))
    except ValueError:
        assert not bucket.any()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-32, 400), st.integers(0, 40), st.integers(0, 3)), max_size=4),
    st.integers(0, 400),
    st.integers(-16, 64),
)
def test_no_placement_crashes(places: list[tuple[int, int, int]], size: int, position: int) -> None:
    tensors = [torch.ones(n, 3) for _, n, _ in places]
    try:
        torch.ops.leeway.flatten_(tensors, bucket_of(size), [p[0] for p in places], [p[2] for p in places], position)
    except ValueError:
        pass


def test_operators_are_sound() -> None:
    given = ([torch.randn(10), torch.randn(130, 5)], bucket_of(2048), [0, 32], [1, 3], 16)
    torch.library.opcheck(torch.ops.leeway.flatten_, given)
    torch.library.opcheck(torch.ops.leeway.flatten_delta_, (*given, 1000))
    torch.library.opcheck(torch.ops.leeway.checksum, (bucket_of(100), 8))
    delta = changes([2], [1, 9])
    torch.library.opcheck(torch.ops.leeway.apply_delta_, (bucket_of(), delta.counts, delta.offsets, delta.values, 0))

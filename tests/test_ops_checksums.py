"""The checksum of buckets: what it is, and what it notices."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops.buckets import checksum, digest

MASK = 2**64 - 1


def reference_sum(data: bytes, position: int = 0) -> int:
    total = 0
    for at in range(0, len(data), 8):
        key = ((position + at) // 8 + 1) * 0x9E3779B97F4A7C15
        x = (int.from_bytes(data[at : at + 8], "little") ^ key) & MASK
        y = ((x & 0xFFFFFFFF) * (x >> 32) + x) & MASK
        total += (y & 0xFFFFFFFF) * (y >> 32) + (y << 32 | y >> 32) + x
    return total & MASK


def sum_of(data: bytes | bytearray, position: int = 0) -> int:
    return int(checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8), position)) & MASK if data else 0


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1000, 4099])
def test_the_checksum_is_as_defined(size: int) -> None:
    assert sum_of(noise(size), 1 << 33) == reference_sum(noise(size), 1 << 33)


def test_digests_stay_what_they_are() -> None:
    """Hosts and versions of this code that meet agree on these numbers."""
    assert digest(sum_of(bytes(range(256))), 256) == 4717329912687131216
    assert digest(0, 0) == 0 and digest(2**64 - 1, 1) == digest(-1, 1) != digest(-1, 2)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 40), max_size=5), st.randoms())
def test_pieces_add_up_in_any_order(data: bytes, cuts: list[int], order: random.Random) -> None:
    edges = sorted({0, len(data), *(8 * cut for cut in cuts if 8 * cut < len(data))})
    pieces = list(pairwise(edges))
    order.shuffle(pieces)
    assert sum(sum_of(data[a:b], a) for a, b in pieces) & MASK == sum_of(data)


def test_every_bit_flip_changes_half_of_the_digest() -> None:
    data = bytearray(noise(256))
    before, flips = digest(sum_of(data), len(data)), []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        flips.append((digest(sum_of(data), len(data)) ^ before).bit_count())
        data[bit // 8] ^= 1 << bit % 8
    assert min(flips) > 10 and 31.5 < np.mean(flips) < 32.5


def test_two_flips_never_cancel() -> None:
    """One bit changes in each of two words, over zeros and over noise: a sum of linear terms misses half of these."""
    for data in (bytes(256), noise(256)):
        words = [data[at : at + 8] for at in range(0, 256, 8)]
        for bit in range(64):
            changes = []
            for i, word in enumerate(words):
                flipped = (int.from_bytes(word, "little") ^ 1 << bit).to_bytes(8, "little")
                changes.append((sum_of(flipped, 8 * i) - sum_of(word, 8 * i)) & MASK)
            assert 0 not in changes
            assert not {(-change) & MASK for change in changes} & set(changes)


@pytest.mark.parametrize("size", [8, 16, 256, 4096])
def test_places_count(size: int) -> None:
    a, b, rest = noise(size, 1), noise(size, 2), noise(999, 3)
    seen = {
        sum_of(a + b + rest),
        sum_of(b + a + rest),  # exchanged
        sum_of(a + a + rest),  # one is the other's
        sum_of(a + bytes(size) + rest),  # never written
        sum_of(bytes(8) + a + b + rest),  # shifted
        sum_of(a + b + rest, 8),
        sum_of(a[1:] + b + rest),
        sum_of((a + b + rest)[: -size // 2]),  # torn
    }
    assert len(seen) == 8


def test_lengths_count() -> None:
    """Zeros at the end have different digests for every length, though some have the same sum."""
    data = noise(16)
    digests = {digest(sum_of(data + bytes(n)), 16 + n) for n in range(200)} | {digest(0, n) for n in range(200)}
    assert len(digests) == 400


def test_terms_are_spread_evenly() -> None:
    """Terms of sparse words, and of zeros at different places: none twice, no bit but the lowest more often set than
    not (that one 5 times in 8, as products are even more often than odd)."""
    sparse = {1 << i | 1 << j | k << 60 for i in range(60) for j in range(i) for k in range(16)}
    for terms in (
        [reference_sum(word.to_bytes(8, "little")) for word in sparse],
        [reference_sum(bytes(8), 8 * i) for i in range(len(sparse))],
    ):
        assert len(set(terms)) == len(sparse)
        array = np.array(terms, dtype=np.uint64)
        for bit in range(1, 64):
            assert abs(((array >> np.uint64(bit)) & np.uint64(1)).mean() - 0.5) < 0.02, bit

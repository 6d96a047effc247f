"""Weights on their way to generators: cast into a flat bucket of bytes and checked in the same pass, or as a delta.

    flatten         tensors -> bucket, and the sum over its bytes
    flatten_delta   tensors -> the bucket of the version before, overwritten, and what changed in it
    apply_delta     what changed -> another bucket of the version before
    checksum        the sum over bytes that came from elsewhere
    digest          a sum and a length -> the 64 bits that name a payload

A payload may be made, sent and checked in pieces, in any order, on any device and with any number of threads: the sums
of its pieces, each told its `position` in bytes, add up mod 2^64 to the payload's (csrc/sync/checksum.h says what they
find). Sums are int64 scalars on the tensors' device, so nothing here waits for a GPU. Positions, and the sizes of all
pieces but the last, are multiples of 8.

Raises `ValueError` or `TypeError` naming the argument that is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from engine.ops import library  # noqa: F401  (registers the operators)

_ops = torch.ops.leeway

ALIGNMENT = 16  # bytes; of buckets in memory and of offsets
BLOCK_UNITS = 65536  # units of 2 bytes in a delta's block
TILE = 128  # rows and columns that share an fp8 scale

_SOURCES = (torch.float64, torch.float32, torch.bfloat16)
_FORMATS = {torch.bfloat16: 1, torch.float32: 2, torch.float8_e4m3fn: 3}  # LeewayFormat; 0 is as it is


def wire_dtype(shape: Sequence[int], dtype: torch.dtype) -> torch.dtype:
    """What a tensor asked for as `dtype` travels as: only matrices have fp8 scales, others stay bfloat16."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn and len(shape) != 2 else dtype


def span(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes that a tensor of `shape` takes in a bucket as `dtype`.

    In float8_e4m3fn those are its elements and then, at the next multiple of `ALIGNMENT`, the float32 scales
    [ceil(rows / 128), ceil(columns / 128)] to multiply them with, as SGLang's `weight_scale_inv`.
    """
    dtype = wire_dtype(shape, dtype)
    num_bytes = Size(shape).numel() * dtype.itemsize
    if dtype != torch.float8_e4m3fn:
        return num_bytes
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT + 4 * -(-shape[0] // TILE) * -(-shape[1] // TILE)


def flatten(
    tensors: Sequence[Tensor], bucket: Tensor, offsets: Sequence[int], dtypes: Sequence[torch.dtype], position: int = 0
) -> Tensor:
    """Writes `tensors` at `offsets` as `dtypes` and zeros between them; the sum over `bucket`, uint8 [bytes].

    Offsets are multiples of 16 and rise. A tensor that has its dtype is copied; float64, float32 and bfloat16 are cast
    to bfloat16, float32 and float8_e4m3fn on the way (to nearest, ties to even, as torch does), other dtypes by torch
    before. fp8 elements are divided by their tile's scale: its greatest finite magnitude / 448, or 1 where that is no
    normal number.
    """
    tensors, formats = _castable(tensors, bucket, dtypes)
    return _ops.flatten_(tensors, bucket, offsets, formats, position)


def checksum(data: Tensor, position: int = 0) -> Tensor:
    """The sum over `data`, uint8 [bytes]."""
    return _ops.checksum(data, position)


def digest(total: int, num_bytes: int) -> int:
    """The 64 bits, unsigned, that name a payload of `num_bytes` bytes whose pieces' sums add up to `total`."""
    return _ops.digest((total + 2**63) % 2**64 - 2**63, num_bytes) % 2**64


@dataclass(frozen=True)
class Delta:
    """The units of 2 bytes in which a bucket differs from the version before, rising, block after block of 65,536."""

    counts: Tensor  # int32 [blocks]: how many changed
    offsets: Tensor  # uint16 [changes]: where in its block
    values: Tensor  # uint16 [changes]: the new bits

    def trim(self) -> "Delta":
        """Without what a GPU left unwritten behind the changes; waits for it.

        Raises `OverflowError` where there are more changes than there was room for: what is to be sent then is the
        bucket itself, which is the new version as a whole.
        """
        total = int(self.counts.sum())
        if total > len(self.offsets):
            raise OverflowError(f"{total} changes, but room for {len(self.offsets)}")
        return Delta(self.counts, self.offsets[:total], self.values[:total])


def flatten_delta(
    tensors: Sequence[Tensor],
    shadow: Tensor,
    offsets: Sequence[int],
    dtypes: Sequence[torch.dtype],
    position: int = 0,
    capacity: int | None = None,
) -> tuple[Tensor, Delta]:
    """`flatten` over the version before: `shadow` becomes the bucket of `tensors`, and the delta says what changed.

    Bits are compared, not values: NaNs and signs of zero arrive too. At most `capacity` changes are kept (None: all
    there can be); `Delta.trim` tells if there were more. On CUDA the delta has room for `capacity` changes.
    """
    room = len(shadow) // 2 if capacity is None else capacity
    tensors, formats = _castable(tensors, shadow, dtypes)
    total, *changes = _ops.flatten_delta_(tensors, shadow, offsets, formats, position, room)
    return total, Delta(*changes)


def apply_delta(bucket: Tensor, delta: Delta, position: int = 0) -> Tensor:
    """Writes a delta into the bucket that it was made from; by how much the sum over the bucket grows.

    All of it or, where a change does not fit, nothing: on CUDA, where raising would wait, the sum then stays as it was,
    which is not the one that came with the delta.
    """
    return _ops.apply_delta_(bucket, delta.counts, delta.offsets, delta.values, position)


def _castable(
    tensors: Sequence[Tensor], bucket: Tensor, dtypes: Sequence[torch.dtype]
) -> tuple[list[Tensor], list[int]]:
    """The tensors and their formats, as the kernels take them."""
    if len(dtypes) != len(tensors):
        raise ValueError(f"dtypes: {len(dtypes)} for {len(tensors)} tensors")
    given, formats = [], []
    for i, (tensor, asked) in enumerate(zip(tensors, dtypes, strict=True)):
        if tensor.device != bucket.device:
            raise ValueError(f"tensors[{i}]: on {tensor.device}, its bucket on {bucket.device}")
        dtype = wire_dtype(tensor.shape, asked)
        if tensor.dtype not in _SOURCES:
            tensor = tensor.to(torch.float32 if dtype == torch.float8_e4m3fn else dtype)
        elif dtype not in _FORMATS:
            tensor = tensor.to(dtype)
        given.append(tensor)
        formats.append(0 if dtype == tensor.dtype else _FORMATS[dtype])
    return given, formats


@torch.library.register_fake("leeway::flatten_")
def _(tensors, bucket, offsets, formats, position):
    return bucket.new_empty((), dtype=torch.int64)


@torch.library.register_fake("leeway::checksum")
def _(data, position):
    return data.new_empty((), dtype=torch.int64)


@torch.library.register_fake("leeway::flatten_delta_")
def _(tensors, shadow, offsets, formats, position, capacity):
    room = torch.library.get_ctx().new_dynamic_size()
    units = [shadow.new_empty(room, dtype=torch.uint16) for _ in range(2)]
    blocks = -(-len(shadow) // (2 * BLOCK_UNITS))
    return shadow.new_empty((), dtype=torch.int64), shadow.new_empty(blocks, dtype=torch.int32), *units


@torch.library.register_fake("leeway::apply_delta_")
def _(bucket, counts, offsets, values, position):
    return bucket.new_empty((), dtype=torch.int64)

"""What a weight version looks like in memory: name, shape, dtype and offset of every tensor, fixed for a job."""

import hashlib
import math
from collections.abc import Container, Iterable, Sequence
from typing import Self

import msgspec
import torch

HOST = torch.device("cpu")
ALIGNMENT = 256  # bytes; of every tensor, for vector loads and for copies by device


class WeightsError(RuntimeError):
    """Weights could not be published or staged; what the generator samples with is as it was."""


class Entry(msgspec.Struct, frozen=True):
    """One tensor of the payload; `offset` in bytes, `dtype` as torch names it ("float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


class Manifest(msgspec.Struct, frozen=True):
    """The tensors of every version in payload order, and the payload's size."""

    entries: tuple[Entry, ...]
    num_bytes: int

    @classmethod
    def lay_out(cls, tensors: Iterable[tuple[str, Sequence[int], torch.dtype]]) -> Self:
        """The manifest of (name, shape, dtype), each tensor at the next multiple of `ALIGNMENT` bytes.

        Raises `ValueError` for a name that stands twice.
        """
        entries: dict[str, Entry] = {}
        offset = 0
        for name, shape, dtype in tensors:
            if name in entries:
                raise ValueError(f"the tensor {name} stands twice in the manifest")
            entry = Entry(name, tuple(shape), str(dtype).removeprefix("torch."), offset)
            entries[name] = entry
            offset += -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(entries.values()), offset)

    @classmethod
    def of(
        cls, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, *, wide: Container[str] = ()
    ) -> Self:
        """The manifest of named tensors whose floating point ones travel as `dtype`, those named in `wide` as float32.

        Reads shapes and dtypes only.
        """

        def carried(name: str, tensor: torch.Tensor) -> torch.dtype:
            if not tensor.is_floating_point():
                return tensor.dtype
            return torch.float32 if name in wide else dtype

        return cls.lay_out((name, tensor.shape, carried(name, tensor)) for name, tensor in tensors)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return msgspec.json.decode(data, type=cls)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @property
    def digest(self) -> str:
        """SHA-256 of the encoded manifest: equal digests mean equal payload layouts."""
        return hashlib.sha256(self.encode()).hexdigest()

    def views(self, payload: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name as views of `payload`, uint8 [num_bytes]."""
        return {
            entry.name: payload[entry.offset : entry.offset + entry.num_bytes].view(entry.torch_dtype).view(entry.shape)
            for entry in self.entries
        }

    def require(self, other: "Manifest") -> None:
        """Raises `WeightsError` naming the first tensor in which `other`, the manifest received, differs."""
        for number in range(max(len(self.entries), len(other.entries))):
            mine, theirs = (str(m.entries[number]) if number < len(m.entries) else "none" for m in (self, other))
            if mine != theirs:
                raise WeightsError(f"manifest: tensor {number} is {theirs}, expected {mine}")
        if self != other:
            raise WeightsError(f"manifest: equal tensors at other offsets, {other.num_bytes} bytes in all")

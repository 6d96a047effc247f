"""Are streams packed and unpacked faster? python bench/packing.py [--device cpu|cuda] [--quick]

Seven per-token streams of 1,024 heavy-tailed sequences, 28 bytes a token, packed in a random order and unpacked again:
`ragged`, where they lie end to end, and `padded`, in rows of equal length. Beside it stand torch's ways, `cat` of
slices and slices copied into a filled tensor, and the bare copy: as many bytes at one stretch into new tensors of the
same sizes, and what is padding filled. The metric is the bytes that each way reads and writes in a second.

On the CPU the metric counts processor time, so that other processes hit all alike; rounds are interleaved.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from bench.rounds import rounds_of  # noqa: E402
from engine.ops.packing import pack, unpack  # noqa: E402

NUM_SEQUENCES = {"cpu": 1024, "cuda": 8192}
DTYPES = [torch.int64, torch.float32, torch.float32, torch.float32, torch.int32, torch.int16, torch.int16]
GOALS = {"cpu": 0.7, "cuda": 0.8}  # of a copy's bytes a second


@dataclass(frozen=True)
class Case:
    """Streams whose sequences begin at `starts` and are `lengths` long, and where packing puts them."""

    streams: list[Tensor]
    starts: Tensor
    cu_seqlens: Tensor
    runs: list[tuple[int, int]]  # start and length of each sequence

    @classmethod
    def of(cls, layout: str, device: str) -> "Case":
        random = torch.Generator().manual_seed(0)
        num = NUM_SEQUENCES[device]
        lengths = torch.empty(num).log_normal_(6.5, 0.8, generator=random).long().clamp(1, 4096)
        offsets = lengths.cumsum(0) - lengths
        starts = offsets if layout == "ragged" else torch.arange(num) * int(lengths.max())
        size = int(lengths.sum()) if layout == "ragged" else num * int(lengths.max())
        order = torch.randperm(num, generator=random)
        starts, lengths = starts[order], lengths[order]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        streams = [torch.randint(0, 99, (size,), generator=random).to(device, dtype) for dtype in DTYPES]
        runs = list(zip(starts.tolist(), lengths.tolist(), strict=True))
        return cls(streams, starts.to(device), cu_seqlens.to(device), runs)

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.runs)

    @property
    def size(self) -> int:
        return len(self.streams[0])

    @property
    def num_bytes(self) -> int:
        """Read and written by both ways, at the least."""
        width = sum(dtype.itemsize for dtype in DTYPES)
        return width * (3 * self.num_tokens + self.size)

    def ours(self) -> list[Tensor]:
        packed = pack(self.streams, self.starts, self.cu_seqlens, self.num_tokens)
        return unpack(packed, self.starts, self.cu_seqlens, self.size)

    @cached_property
    def sources(self) -> list[Tensor]:
        return [stream.new_ones(self.num_tokens) for stream in self.streams]

    def copies(self) -> list[Tensor]:
        """What packing and unpacking cannot help to move."""
        packed = [source.clone() for source in self.sources]
        loose = [stream.new_empty(self.size) for stream in packed]
        for to, source in zip(loose, self.sources, strict=True):
            to[: self.num_tokens].copy_(source)
            to[self.num_tokens :].zero_()
        return loose

    def plain(self) -> list[Tensor]:
        slices = [[stream[start : start + length] for start, length in self.runs] for stream in self.streams]
        packed = [torch.cat(each) for each in slices]
        loose = [stream.new_zeros(self.size) for stream in packed]
        for to, stream in zip(loose, packed, strict=True):
            at = 0
            for start, length in self.runs:
                to[start : start + length] = stream[at : at + length]
                at += length
        return loose


def rows_of(layout: str, device: str, rounds: int) -> list[dict]:
    case = Case.of(layout, device)
    assert all(torch.equal(a, b) for a, b in zip(case.ours(), case.plain(), strict=True))
    arms = {"ours": case.ours, "torch cat and slices": case.plain, "copy": case.copies}
    figures = rounds_of(arms, rounds, device)
    speeds = {name: [case.num_bytes / 1e9 / taken for taken in figures[name]] for name in arms}
    unit = "GB/cpu_s" if device == "cpu" else "GB/s"
    goals = {"copy": GOALS[device]}
    return [results.row(layout, unit, speeds["ours"], speeds[name], name, goals.get(name)) for name in list(arms)[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(NUM_SEQUENCES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="five rounds instead of fifteen")
    options = parser.parse_args()
    rounds = 5 if options.quick else 15
    rows = [row for layout in ("ragged", "padded") for row in rows_of(layout, options.device, rounds)]
    results.keep("packing", options.device, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

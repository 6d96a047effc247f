"""Are weights cast, checked and compared at the speed of memory? python bench/flatten.py [--device cpu|cuda] [--quick]

flatten   float32 tensors into a bfloat16 bucket with its checksum, one pass
fp8       the same into e4m3 with a scale for each tile of 128 x 128, in two passes over the tensors
delta     the same over the version before, of which 1% of the weights change, with the changes
apply     those changes into another bucket, with its new checksum
checksum  of a bucket alone
publish   a version into shared memory, and its staged copy, both with their digests (on the host only)

Speeds count the bytes that cannot be helped: read once, written once. Beside each stands a copy of as many bytes (half
read, half written; beside those that hardly write, a plain read too), and what one would write without the operators:
`.to(bfloat16)`, `torch.cat` and xxh3; a comparison of the two versions' bits; xxh3 alone; a copy and xxh3 tensor by
tensor. On CUDA, where xxh3 is not to be had, the peers compute no checksum.

On the CPU one thread works and the clock is processor time, so that other processes hit all alike; rounds are
interleaved.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from engine.ops import buckets  # noqa: E402
from engine.weights import Manifest, Publisher, Subscriber  # noqa: E402
from engine.weights.segment import pieces  # noqa: E402
from engine.weights.subscribe import SharedSource  # noqa: E402

ROUNDS = 9
CHANGED = 100  # one weight in so many
HIDDEN, VOCAB = 1024, 32_000
SIZES = {("cpu", True): 20e6, ("cpu", False): 100e6, ("cuda", True): 100e6, ("cuda", False): 1e9}
GOALS = {"cpu": 0.70, "cuda": 0.85}


def transformer(num_parameters: float, device: str) -> list[Tensor]:
    """Matrices and norms in the proportions of a language model."""
    layer = [(2 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (8 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (HIDDEN,), (HIDDEN,)]
    per_layer = sum(torch.Size(shape).numel() for shape in layer)
    shapes = [(VOCAB, HIDDEN) if num_parameters > 50e6 else (HIDDEN, HIDDEN)]
    shapes += max(1, round((num_parameters - torch.Size(shapes[0]).numel()) / per_layer)) * layer
    return [torch.randn(shape, device=device) * 0.02 for shape in shapes]


def moved_on(tensors: list[Tensor]) -> list[Tensor]:
    """The next version: one weight in `CHANGED` differs."""
    return [torch.where(torch.rand_like(tensor) < 1 / CHANGED, tensor * 1.1, tensor) for tensor in tensors]


def seconds(work: Callable[[], object], device: str) -> float:
    clock = time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    started = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


Works = dict[str, tuple[Callable[[], object], float]]  # what is done, and the bytes that it moves


def measured(works: Works, device: str) -> dict[str, list[float]]:
    """GB/s of each, round by round."""
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for warm in [False] + [True] * ROUNDS:
        for name, (work, num_bytes) in works.items():
            taken = seconds(work, device)
            if warm:
                speeds[name].append(num_bytes / taken / 1e9)
    return speeds


def xxh3(bucket: Tensor) -> None:
    if bucket.device.type == "cpu":
        xxhash.xxh3_64_intdigest(bucket.view(torch.uint8).numpy().data)


class Kernels:
    """The operators on one device, between two versions of the weights."""

    def __init__(self, num_parameters: float, device: str):
        self.versions = [transformer(num_parameters, device)]
        self.versions.append(moved_on(self.versions[0]))
        self.turn = 0
        self.count = sum(tensor.numel() for tensor in self.versions[0])
        self.device = device
        self.buckets = {dtype: self._laid_out(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)}
        self.shadow = self.flatten(torch.bfloat16).clone()
        self.old = self.shadow.clone()
        self.changes = self.delta()[1].trim()
        self.flat = [torch.cat([tensor.bfloat16().flatten() for tensor in version]) for version in self.versions]

    def _laid_out(self, dtype: torch.dtype) -> tuple[Tensor, list[int], list[torch.dtype]]:
        offsets, end = [], 0
        for tensor in self.versions[0]:
            offsets.append(end)
            end += -(-buckets.span(tensor.shape, dtype) // 256) * 256
        bucket = torch.empty(end, dtype=torch.uint8, device=self.device)
        return bucket, offsets, [dtype] * len(offsets)

    def flatten(self, dtype: torch.dtype) -> Tensor:
        bucket, offsets, dtypes = self.buckets[dtype]
        buckets.flatten(self.versions[0], bucket, offsets, dtypes)
        return bucket

    def delta(self) -> tuple[Tensor, buckets.Delta]:
        """To the other version and, the next time, back."""
        self.turn = 1 - self.turn
        _, offsets, dtypes = self.buckets[torch.bfloat16]
        return buckets.flatten_delta(
            self.versions[self.turn], self.shadow, offsets, dtypes, capacity=self.count // CHANGED * 2
        )

    def apply(self) -> Tensor:
        return buckets.apply_delta(self.old, self.changes)

    def cast_and_cat(self) -> None:
        xxh3(torch.cat([tensor.to(torch.bfloat16).flatten() for tensor in self.versions[0]]))

    def compare(self) -> None:
        """What changed, by torch: the flat bucket of the new version, its bits beside the old one's, and the hash."""
        new = torch.cat([tensor.to(torch.bfloat16).flatten() for tensor in self.versions[1]])
        changed = (new.view(torch.int16) != self.flat[0].view(torch.int16)).nonzero().flatten()
        new.view(torch.int16)[changed]
        xxh3(new)

    def works(self) -> Works:
        n, num_changed = self.count, len(self.changes.offsets)
        bucket = self.shadow
        return {
            "copy": (self._copy(3 * n), 6 * n),
            "read": (self._read(6 * n), 6 * n),
            "flatten": (lambda: self.flatten(torch.bfloat16), 6 * n),
            "fp8": (lambda: self.flatten(torch.float8_e4m3fn), 5 * n),
            "cast": (self.cast_and_cat, 6 * n),
            "delta": (self.delta, 6 * n + 4 * num_changed),
            "compare": (self.compare, 6 * n + 4 * num_changed),
            "apply": (self.apply, 6 * num_changed),
            "checksum": (lambda: buckets.checksum(bucket), len(bucket)),
            "xxh3": (lambda: xxh3(bucket), len(bucket)),
        }

    def _copy(self, num_bytes: int) -> Callable[[], object]:
        source, to = (torch.ones(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        return (lambda: np.copyto(to.numpy(), source.numpy())) if self.device == "cpu" else (lambda: to.copy_(source))

    def _read(self, num_bytes: int) -> Callable[[], object]:
        source = torch.ones(num_bytes // 4, dtype=torch.int32, device=self.device)
        return source.numpy().max if self.device == "cpu" else source.max


def kernel_rows(num_parameters: float, device: str) -> list[dict]:
    speeds = measured(Kernels(num_parameters, device).works(), device)
    goal = GOALS[device]
    hashed = "" if device == "cuda" else ", xxh3"

    def row(ours: str, reference: str, name: str, goal: float | None) -> dict:
        return results.row(ours, "GB/s", speeds[ours], speeds[reference], name, goal)

    rows = [
        row("flatten", "copy", "copy of as many bytes", goal),
        row("flatten", "cast", f"to(bfloat16), cat{hashed}", 1),
        row("fp8", "copy", "copy of as many bytes", None),
        row("delta", "copy", "copy of as many bytes", goal),
        row("delta", "read", "plain read of as many bytes", None),
        row("delta", "compare", f"to, cat, !=, nonzero, index{hashed}", 1),
        row("apply", "copy", "copy of as many bytes", None),
        row("checksum", "copy", "copy of as many bytes", None),
        row("checksum", "read", "plain read of as many bytes", None),
    ]
    return rows + ([row("checksum", "xxh3", "xxh3", None)] if device == "cpu" else [])


def publish_rows(num_parameters: float) -> list[dict]:
    """Both sides of the shared memory: ours, and with a pass of xxh3 behind every copy."""
    given = [(f"layer{i}", tensor) for i, tensor in enumerate(transformer(num_parameters, "cpu"))]
    manifest = Manifest.of(given, torch.bfloat16)
    source, mine = (torch.ones(manifest.num_bytes, dtype=torch.uint8) for _ in range(2))
    views = manifest.views(source)
    version = 0

    def publish() -> None:
        nonlocal version
        version += 1
        publisher.publish(0, version, given)

    def publish_plainly() -> None:
        digest = xxhash.xxh3_64()
        for (name, tensor), entry in zip(given, manifest.entries, strict=True):
            views[name].copy_(tensor)
            digest.update(source.numpy()[entry.offset : entry.offset + entry.num_bytes].data)

    def stage_plainly() -> None:
        digest = xxhash.xxh3_64()
        to, there = torch.empty(manifest.num_bytes, dtype=torch.uint8).numpy(), source.numpy()
        for piece in pieces(manifest.num_bytes):
            np.copyto(to[piece], there[piece])
            digest.update(to[piece].data)

    name = f"bench-{os.getpid()}"
    with closing(Publisher(name, manifest)) as publisher, closing(Subscriber(SharedSource(name))) as subscriber:
        publish()
        works: Works = {
            "publish": (publish, manifest.num_bytes),
            "publish plainly": (publish_plainly, manifest.num_bytes),
            "stage": (lambda: subscriber.stage(0, version), manifest.num_bytes),
            "stage plainly": (stage_plainly, manifest.num_bytes),
        }
        speeds = measured(works, "cpu")
    return [
        results.row(name, "GB/s of payload", speeds[name], speeds[f"{name} plainly"], "copy, xxh3", 1)
        for name in ("publish", "stage")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = SIZES[options.device, options.quick]
    rows = kernel_rows(size, options.device)
    if options.device == "cpu":
        rows += publish_rows(size)
    results.keep("flatten", options.device, rows, parameters=size)


if __name__ == "__main__":
    main()

"""The loss from hidden states and the head's weight, gradients included: its speed, its memory, and what rows cost.

    python bench/linear_loss.py [--device cpu|cuda] [--quick]

Beside it, over the same rows: the three matrix products alone, on whole matrices; torch, in chunks whose logits are
made again for backward; torch on whole matrices, for the memory; and on CUDA what is installed of Liger (PPO), Cut
Cross-Entropy and verl's fused kernel (neither of which computes a loss of policies, only log-probabilities).

Memory is the highest while it runs, beyond inputs and the two gradients: on the CPU that of a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from results import keep, row
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import head  # noqa: E402
from engine.algorithms.method import Method, Tokens, compose  # noqa: E402
from engine.config import Algorithm  # noqa: E402

VOCAB = 151_936
LENGTH = 256  # tokens of a completion
SIZES = {"cpu": [(1024, 1024), (256, 4096)], "cuda": [(16384, 1024), (16384, 4096)]}  # (tokens, width)
QUICK = {"cpu": [(512, 256)], "cuda": [(4096, 1024)]}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = {"cpu": 3, "cuda": 9}
GOALS = {  # speed over the reference's
    ("cpu", "products"): 1 / 1.10,
    ("cuda", "products", 1024): 1 / 1.40,
    ("cuda", "products", 4096): 1 / 1.15,
    ("cuda", "liger"): 2.0,
    ("cpu", "memory"): 20.0,
    ("cuda", "memory"): 20.0,
    ("cuda", "active"): 0.9,
}


@dataclass(frozen=True)
class Work:
    """Everything that a contestant needs. It leaves its gradients in `module.weight.grad` and `hidden.grad`."""

    hidden: Tensor
    module: nn.Linear
    targets: Tensor
    tokens: Tokens
    method: Method

    @classmethod
    def of(cls, num_tokens: int, width: int, device: str) -> "Work":
        torch.manual_seed(0)
        kind = {"device": device, "dtype": DTYPES[device]}
        module = nn.Linear(width, VOCAB, bias=False, **kind)
        behaviour = torch.full((num_tokens,), -12.0, device=device) + torch.randn(num_tokens, device=device)
        num_sequences = max(1, num_tokens // LENGTH)
        tokens = Tokens(
            behaviour=behaviour,
            advantage=torch.randn(num_tokens, device=device),
            mask=torch.ones(num_tokens, device=device),
            sequence=torch.arange(num_tokens, device=device) * num_sequences // num_tokens,
            lengths=torch.full((num_sequences,), num_tokens // num_sequences, device=device),
        )
        # No clipping, so that every row takes part in all three products.
        algorithm = Algorithm(
            loss={"name": "importance"}, correction={"name": "tis"}, kl={"name": "k3", "coefficient": 0.0}
        )
        hidden = torch.randn(num_tokens, width, **kind).requires_grad_()
        targets = torch.randint(VOCAB, (num_tokens,), device=device)
        return cls(hidden, module, targets, tokens, compose(algorithm))

    def with_active(self, share: float) -> "Work":
        """The same rows, of which only the first in every 1 / share train."""
        mask = (torch.arange(len(self.targets), device=self.hidden.device) % round(1 / share) == 0).float()
        return replace(self, tokens=replace(self.tokens, mask=mask))

    def loss(self, backend: type[head.Head]) -> Tensor:
        size = {"num_tokens": len(self.targets), "num_sequences": len(self.tokens.lengths)}
        loss, _ = backend(self.module, 1.0, self.method).loss(self.hidden, self.targets, self.tokens, **size)
        return loss

    def forget(self) -> None:
        self.hidden.grad = self.module.weight.grad = None


Contestant = Callable[[Work], Any]


def ours(work: Work) -> None:
    work.loss(head.Fused).backward()


def eager_chunked(work: Work) -> None:
    work.loss(head.Reference).backward()


def eager(work: Work) -> None:
    before, head.LOGITS_AT_ONCE = head.LOGITS_AT_ONCE, 2**62
    work.loss(head.Reference).backward()
    head.LOGITS_AT_ONCE = before


@torch.no_grad()
def products(work: Work) -> tuple[Tensor, Tensor]:
    logits = work.hidden @ work.module.weight.T
    return logits @ work.module.weight, logits.T @ work.hidden


def liger(work: Work) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

    shape = (len(work.tokens.lengths), -1)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=1.0, epsilon_high=1e9)
    loss(
        work.hidden.view(*shape, work.hidden.shape[1]),
        work.module.weight,
        work.targets.view(shape),
        work.tokens.mask.view(shape),
        work.tokens.advantage.view(shape)[:, 0],
    )[0].backward()


def cut_cross_entropy(work: Work) -> None:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    linear_cross_entropy(work.hidden, work.module.weight, work.targets).backward()


def verl(work: Work) -> None:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    logprob, entropy = linear_cross_entropy(work.hidden, work.module.weight, work.targets, 1.0, "none")
    (logprob * work.tokens.advantage).sum().backward()


PEERS: dict[str, Contestant] = {"products": products, "eager_chunked": eager_chunked}
CUDA_PEERS: dict[str, Contestant] = {"liger": liger, "cut_cross_entropy": cut_cross_entropy, "verl": verl}
MEASURED: dict[str, Contestant] = {"ours": ours, "eager": eager}  # for their memory


# ---- Measuring ---------------------------------------------------------------------------------------------------


def seconds(contestant: Contestant, work: Work) -> float:
    work.forget()
    synchronize(work)
    begin = time.perf_counter()
    contestant(work)
    synchronize(work)
    return time.perf_counter() - begin


def synchronize(work: Work) -> None:
    if work.hidden.is_cuda:
        torch.cuda.synchronize()


def available(device: str, work: Work) -> dict[str, Contestant]:
    """The contestants that run here; a peer that is not installed, or fails, is left out and told."""
    found = dict(PEERS)
    for name, peer in CUDA_PEERS.items() if device == "cuda" else ():
        try:
            seconds(peer, work)
            found[name] = peer
        except Exception as error:  # a peer's own trouble ends its part alone
            print(f"without {name}: {type(error).__name__}: {str(error)[:200]}")
    return found


def speeds(device: str, work: Work, rounds: int) -> list[dict[str, Any]]:
    num_tokens, width = work.hidden.shape
    case = f"{num_tokens:,} tokens, width {width:,}"
    quarter = work.with_active(0.25)
    peers = available(device, work)
    seconds(ours, work)
    times: dict[str, list[float]] = {name: [] for name in ("ours", "quarter", *peers)}
    for _ in range(rounds):
        times["ours"].append(seconds(ours, work))
        times["quarter"].append(seconds(ours, quarter))
        for name, peer in peers.items():
            times[name].append(seconds(peer, work))
    work.forget()

    def rate(name: str, tokens: float = num_tokens) -> list[float]:
        return [tokens / each for each in times[name]]

    rows = [
        row(
            case,
            "tokens/s",
            rate("ours"),
            rate(name),
            name,
            GOALS.get((device, name), GOALS.get((device, name, width))),
        )
        for name in peers
    ]
    active = rate("quarter", num_tokens / 4)
    return [*rows, row(case, "active tokens/s", active, rate("ours"), "all active", GOALS.get((device, "active")))]


def peak_bytes(name: str, num_tokens: int, width: int, device: str) -> int:
    """Of a process of its own: the highest memory beyond inputs and gradients."""
    command = [sys.executable, __file__, "--device", device, "--peak", name, str(num_tokens), str(width)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure_peak(name: str, num_tokens: int, width: int, device: str) -> int:
    work = Work.of(num_tokens, width, device)
    small = Work.of(8, width, device)
    MEASURED[name](small)  # what libraries take once
    gradients = [work.hidden, work.module.weight]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in gradients)
    del small
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        MEASURED[name](work)
        return torch.cuda.max_memory_allocated() - before - taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    MEASURED[name](work)
    return _status("VmHWM") - before - taken


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(device: str, num_tokens: int, width: int) -> dict[str, Any]:
    """Tokens for each MB, so that more is better."""
    rates = {name: num_tokens / (peak_bytes(name, num_tokens, width, device) / 1e6) for name in MEASURED}
    case = f"{num_tokens:,} tokens, width {width:,}"
    return row(case, "tokens/MB", [rates["ours"]], [rates["eager"]], "eager, whole", GOALS[device, "memory"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, num_tokens, width = options.peak
        print(measure_peak(name, int(num_tokens), int(width), options.device))
        return
    rows = []
    for num_tokens, width in (QUICK if options.quick else SIZES)[options.device]:
        rows.append(memory(options.device, num_tokens, width))
        work = Work.of(num_tokens, width, options.device)
        rows += speeds(options.device, work, 2 if options.quick else ROUNDS[options.device])
        del work
    name = "linear_loss-quick" if options.quick else "linear_loss"
    keep(name, options.device, rows, threads=torch.get_num_threads(), dtype=str(DTYPES[options.device]), vocab=VOCAB)


if __name__ == "__main__":
    main()

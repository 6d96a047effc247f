"""How many weights does a step change, as bfloat16 sees them? python bench/density.py [--quick]

Models with random weights, of 1.2 million parameters as in configs/tiny.toml and of 40 million, take steps of AdamW on
policy gradients of random completions, whose advantages are random too; norms are clipped to 1. Learning rates from
1e-6 to 1e-3. For every step: the share of the bfloat16 weights whose bits changed, and the bytes of the delta against
those of the whole; where a delta is too large, the whole travels.

The share follows from the step against the weight: AdamW moves each by about the learning rate, and bfloat16 keeps 8
bits of a weight. Weights of 0.02, as here, change where their step crosses a multiple of 2^-13 to 2^-14.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from engine.config import Model, load  # noqa: E402
from engine.model import build  # noqa: E402
from engine.policy import named_tensors  # noqa: E402
from engine.weights import Manifest, Publisher  # noqa: E402
from engine.weights.delta import CHANGE_BYTES  # noqa: E402

RATES = (1e-6, 1e-5, 1e-4, 1e-3)
STEPS, QUICK_STEPS = 8, 4
BATCH, LENGTH, VOCAB = 8, 48, 512
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8}


def models(quick: bool) -> dict[str, Model]:
    tiny = load(ROOT / "configs" / "tiny.toml").model
    large = Model(init={**tiny.init, **LARGE, "num_key_value_heads": 4, "head_dim": 64}, context=tiny.context)
    return {"1.2M": tiny} if quick else {"1.2M": tiny, "40M": large}


def steps(model: torch.nn.Module, rate: float, num: int) -> Iterator[int]:
    """Takes `num` steps of policy gradient, yielding after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(num):
        loss = policy_gradient(model, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step


def policy_gradient(model: torch.nn.Module, generator: torch.Generator) -> Tensor:
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    advantage = torch.randn(BATCH, generator=generator)[:, None]
    logprobs = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -(advantage * logprobs.gather(2, tokens[:, 1:, None])[..., 0]).mean()


def measure(spec: Model, rate: float, num: int) -> tuple[list[float], list[float], int]:
    """For each step: the share that changed, and the bytes that travel; and the bytes of the whole."""
    model = build(spec, vocab_size=VOCAB, eos_id=1, pad_id=0, seed=0)
    model.set_attn_implementation("sdpa")
    manifest = Manifest.of(named_tensors(model), torch.bfloat16)
    shares, travelled = [], []
    before = {name: tensor.bfloat16() for name, tensor in named_tensors(model)}
    total = sum(tensor.numel() for tensor in before.values())
    with closing(Publisher(f"density-{os.getpid()}", manifest, delta=True)) as publisher:
        publisher.publish(0, 0, named_tensors(model))
        for step in steps(model, rate, num):
            publisher.publish(0, step + 1, named_tensors(model))
            after = {name: tensor.bfloat16() for name, tensor in named_tensors(model)}
            changed = sum(
                int((before[name].view(torch.int16) != now.view(torch.int16)).sum()) for name, now in after.items()
            )
            assert publisher.delta_bytes == 0 or publisher.delta_bytes >= CHANGE_BYTES * changed
            shares.append(changed / total)
            travelled.append(publisher.delta_bytes or manifest.num_bytes)
            before = after
    return shares, travelled, manifest.num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = []
    for size, spec in models(quick).items():
        for rate in RATES:
            shares, travelled, whole = measure(spec, rate, QUICK_STEPS if quick else STEPS)
            case, num = f"{size}, lr {rate:g}", len(shares)
            rows.append(results.row(case, "share changed", shares, [1.0] * num, "all", None))
            fewer = [1 / each for each in travelled], [1 / whole] * num
            rows.append(results.row(case, "1/bytes", *fewer, "whole", 10.0 if rate == 1e-6 else None))
    results.keep("density", "cpu", rows, quick=quick)


if __name__ == "__main__":
    main()

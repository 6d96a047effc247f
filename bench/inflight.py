"""What does an update cost an SGLang server's running requests? python bench/inflight.py [--quick]

A real server decodes sixteen completions at a time while weights are updated every so many tokens, under
`generator.kv = "recompute"` (each request's cache is computed anew) and `"keep"` (found again), and with no updates at
all. Tokens a second from the first to the last token, and the seconds of an update, in which nothing is sampled: the
abort, the last words, the copy into the server.

On a CPU, by configs/sglang_cpu.toml and its stand-ins, the model is tiny: a step costs what its calls cost, whatever it
computes, and to compute caches anew costs a few steps more. Large models on long completions will pay more for it.
"""

import argparse
import select
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sglang_server import configure  # noqa: E402

from bench import results  # noqa: E402
from engine import tokenizer as tokenizers  # noqa: E402
from engine.generators import sglang  # noqa: E402
from engine.generators.sglang import SGLang  # noqa: E402
from engine.model import build, describe  # noqa: E402
from engine.policy import manifest_of, named_tensors  # noqa: E402
from engine.schema import Lease, Prompt, Sampling  # noqa: E402
from engine.weights.manifest import HOST  # noqa: E402

GROUPS, SAMPLES, PROMPT, LENGTH = 16, 4, 256, 192
EVERY = 512  # tokens of all requests between updates
ROUNDS, QUICK_ROUNDS = 3, 1
OVERRIDES = ("model.context=512", "generator.max_new_tokens=200", "learner.tokens_per_micro_batch=1024")
OPTIONS = ("generator.sglang.options.max_total_tokens=16384",)


def lease(number: int, vocab: int) -> Lease:
    ids = np.random.default_rng(number).integers(2, vocab, PROMPT).astype(np.int32)
    return Lease("train", number, 0, 0, 0, SAMPLES, Prompt("d", number, ids, "", ""), Sampling(1.0, LENGTH))


class Arm:
    """One generator on the server, and the weights that it is given again and again."""

    def __init__(self, engine: SGLang, model: torch.nn.Module):
        config = engine._config
        manifest = manifest_of(model, config)  # type: ignore[arg-type]
        self.engine, self.views, self.version = engine, manifest.views(engine.memory(manifest.num_bytes, HOST)), 0
        for name, tensor in named_tensors(model):
            self.views[name].copy_(tensor)

    def load(self) -> float:
        begin = time.perf_counter()
        self.engine.load(self.version, self.views)
        self.version += 1
        return time.perf_counter() - begin

    def round(self, vocab: int, updates: bool) -> tuple[float, list[float]]:
        """Tokens a second, and the seconds of each update."""
        engine, pauses, done = self.engine, [], 0
        self.load()
        begin, first = time.perf_counter(), engine.generated_tokens
        due = first + EVERY
        for number in range(GROUPS):
            engine.submit(lease(number, vocab))
        while done < GROUPS:
            select.select([engine.fileno()], [], [], 0.005)
            done += len(engine.poll(0.0))
            if updates and engine.generated_tokens >= due and done < GROUPS:
                pauses.append(self.load())
                due = engine.generated_tokens + EVERY
        return (engine.generated_tokens - first) / (time.perf_counter() - begin), pauses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    config = configure(*OVERRIDES, *OPTIONS)
    tokens = tokenizers.load(config.model)
    model = build(config.model, vocab_size=len(tokens), eos_id=1, pad_id=0, seed=0).requires_grad_(False)
    rates: dict[str, list[float]] = {"recompute": [], "keep": [], "no updates": []}
    pauses: list[float] = []
    with (
        closing(sglang.from_files(config, {**tokenizers.files(tokens), **describe(model)}, tokens)) as server,
        tempfile.NamedTemporaryFile("w") as key,
    ):
        key.write(server._server.api_key)  # type: ignore[union-attr]
        key.flush()
        where = (f"generator.sglang.url={server._client.url}", f"generator.sglang.api_key_file={key.name}")

        def measure(kv: str) -> tuple[float, list[float]]:
            policy = "keep" if kv == "keep" else "recompute"
            joined = configure(*OVERRIDES, *where, f"generator.kv={policy}")
            with closing(sglang.from_files(joined, describe(model), tokens)) as engine:
                return Arm(engine, model).round(len(tokens), updates=kv != "no updates")

        measure("recompute")  # the server's first steps are slow
        for number in range(QUICK_ROUNDS if quick else ROUNDS):
            for kv in sorted(rates, reverse=number % 2 == 1):
                rate, took = measure(kv)
                rates[kv].append(rate)
                pauses += took
    rows = [
        results.row("updates in flight", "tokens/s", rates["keep"], rates["recompute"], "recompute", None),
        results.row("updates in flight", "tokens/s", rates["recompute"], rates["no updates"], "no updates", None),
        results.row("updates in flight", "tokens/s", rates["keep"], rates["no updates"], "no updates", None),
    ]
    results.keep("inflight", "cpu", rows, quick=quick, pause_s=median(pauses), num_updates=len(pauses))
    print(f"median pause of {len(pauses)} updates: {1000 * median(pauses):.0f} ms")


if __name__ == "__main__":
    main()

"""The head in float32 of a model that SGLang serves in bfloat16, on a real server without a GPU."""

import select
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest
from sglang_server import configure

from engine import tokenizer as tokenizers
from engine.config import Config, ConfigError
from engine.generators import sglang
from engine.generators.client import LOADER, check_served
from engine.generators.sglang import SGLang
from engine.model import build, describe
from engine.policy import manifest_of, named_tensors
from engine.schema import Lease, Prompt, Sampling
from engine.weights.manifest import HOST

HALF = ("generator.dtype=bfloat16", "model.init.initializer_range=0.15")
WAIT_S = 60.0


def asked(fp32_head: bool, *overrides: str) -> Config:
    return configure(*HALF, f"model.fp32_head={str(fp32_head).lower()}", *overrides)


TOKENIZER = tokenizers.load(asked(True).model)
MODEL = build(asked(True).model, vocab_size=len(TOKENIZER), eos_id=1, pad_id=0, seed=0).requires_grad_(False)


@contextmanager
def serving(config: Config) -> Iterator[SGLang]:
    """A server with the weights of `MODEL`."""
    files = {**tokenizers.files(TOKENIZER), **describe(MODEL)}
    with closing(sglang.from_files(config, files, TOKENIZER)) as engine:
        manifest = manifest_of(MODEL, config)
        assert {entry.dtype for entry in manifest.entries} == {"bfloat16"}  # the head's too, which SGLang would narrow
        views = manifest.views(engine.memory(manifest.num_bytes, HOST))
        for name, tensor in named_tensors(MODEL):
            views[name].copy_(tensor)
        engine.load(0, views)
        yield engine


def share_between(engine: SGLang) -> float:
    """Which share of the differences between logits of one position lies between multiples of 1/512: about 0 where they
    are bfloat16, which above 1/4 in magnitude are such multiples, and 0.96 where they may be any number."""
    prompt = np.arange(2, 12, dtype=np.int32)
    engine.submit(Lease("train", 0, 0, 0, 7, 64, Prompt("d", 0, prompt, "", ""), Sampling(1.0, 1)))
    limit, finished = time.monotonic() + WAIT_S, []
    while not finished:
        assert select.select([engine.fileno()], [], [], limit - time.monotonic())[0]
        finished = engine.poll(0.0)
    logprobs = np.unique(finished[0].logprobs.astype(np.float64))  # of several tokens
    assert len(logprobs) >= 5
    steps = (logprobs[-1] - logprobs[:-1]) * 512
    return float((np.abs(steps - steps.round()) > 0.02).mean())


@pytest.mark.slow
def test_the_head_computes_in_float32_where_it_is_asked_to(warm: list[str]) -> None:
    with serving(asked(True, *warm)) as engine:
        assert share_between(engine) > 0.5


def test_a_server_that_computes_the_head_otherwise_is_refused() -> None:
    served = {"custom_weight_loader": [LOADER], "enable_fp32_lm_head": False}
    check_served(served, asked(False))
    check_served(served, configure("model.fp32_head=true"))  # in float32 it is anyway
    check_served({**served, "enable_fp32_lm_head": True}, asked(True))
    with pytest.raises(ConfigError, match="^model.fp32_head = true: .* was not started with --enable-fp32-lm-head$"):
        check_served(served, asked(True))

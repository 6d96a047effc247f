"""A task whose answers have a heavy-tailed length: a mixture of geometric distributions, one a prompt.

The model is a warm start on it: after `a:` it goes on with `a` and stops with the probability that the demonstrations
taught, so lengths vary as those of a reasoning model do, from prompt to prompt and within a group.
"""

import random
from pathlib import Path
from typing import Any

import torch

from engine import tokenizer as tokenizers
from engine.config import Config, parse
from engine.model import build
from engine.process import StopSignal
from engine.warm_start import warm_start

KINDS = {"a": (0.6, 8), "b": (0.3, 32), "c": (0.1, 160)}  # letter -> share of prompts, mean length in tokens
LONGEST = 248  # tokens
CONTEXT = 256
SHAPE = {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
SIZE = {"hidden_size": 160, "num_hidden_layers": 4, "intermediate_size": 448, "head_dim": 40}


def draw(seed: int, index: int) -> dict[str, Any]:
    """One prompt; the number in it only makes prompts differ."""
    dice = random.Random(f"{seed}/{index}")
    letter = dice.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
    length = 1
    while dice.random() > 1 / KINDS[letter][1] and length < LONGEST - 1:
        length += 1
    return {"prompt": f"{dice.randrange(10**5):05d}{letter}:", "answer": letter * length}


def parity(prompt: str, completion: str, answer: str, **fields: Any) -> float:
    """1 for an even number of characters: rewards within a group differ, and nothing is to be learned of length."""
    return float(len(completion) % 2 == 0)


def table(**run: Any) -> dict[str, Any]:
    """The job's configuration as a TOML table; `run` overrides its [run]."""
    return {
        "run": {"name": "heavy-tail", "groups_per_step": 16, "group_size": 8, "steps": 12, **run},
        "model": {
            "context": CONTEXT,
            "init": {**SHAPE, **SIZE},
            "tokenizer": {"alphabet": "0123456789:" + "".join(KINDS)},
        },
        "warm_start": {"steps": 120, "batch_size": 32, "lr": 3e-3},
        "domains": [
            {"name": "run", "source": "callable", "task": "bench.heavy_tail:draw", "reward": "bench.heavy_tail:parity"}
        ],
        "generator": {"max_new_tokens": LONGEST, "slots": 128, "threads": 1},
        "learner": {"tokens_per_micro_batch": 4096, "lr": 1e-7, "threads": 1},
        "algorithm": {"filter_uniform": False},
        "checkpoint": {"every": 10**6, "export": False},
        "tracking": {"tensorboard": False, "progress": False},
    }


def make_model(directory: Path) -> None:
    """Writes the warmed-up model and its tokenizer to `directory`; trained once and cached."""
    torch.set_num_threads(1)
    config: Config = parse(table())
    tokenizer = tokenizers.load(config.model)
    policy = build(config.model, seed=0, **tokenizers.vocabulary(tokenizer))
    warm_start(config, policy, tokenizer, StopSignal(config.deadlines.stop_s))
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

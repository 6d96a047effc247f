"""A tiny model, takes for it, and learners on any number of ranks: shared by the tests of learner and checkpoint."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from engine import config as configuration
from engine import parallel
from engine.algorithms.method import Method, compose
from engine.attention import Layout
from engine.config import Config
from engine.learner import Learner
from engine.model import build, hidden_states, lm_head
from engine.packer import Update, pack
from engine.schema import Group
from rewards.verdict import Verdict

VOCAB = 11
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2},
    "gpt_neox": {"initializer_range": 0.2},  # float64 throughout; the others' norms compute in float32
}
FIXED = torch.tensor([1.0, -1.0, 0.5, -0.5])  # advantages of a group's completions


def configure(*overrides: str, model: str = "qwen3", dtype: str = "float64", tied: bool = True) -> Config:
    """A valid configuration with the tiny model; `overrides` as on the command line."""
    init = {"model_type": model, "tie_word_embeddings": tied, **SHAPE, **MODELS[model]}
    table: dict[str, Any] = {
        "run": {"name": "t", "steps": 10, "groups_per_step": 2, "group_size": 4},
        "model": {"init": init, "dtype": dtype, "context": 32},
        "domains": [{"name": "d", "source": "callable"}],
        "generator": {"max_new_tokens": 8},
        "learner": {"tokens_per_micro_batch": 32, "lr": 0.01, "clip_norm": 1e9},
        "algorithm": {"loss": {"name": "reinforce"}},
    }
    for override in overrides:
        configuration.apply_override(table, override)
    return configuration.parse(table)


def learner(config: Config, directory: Path, method: Method | None = None) -> Learner:
    model = build(config.model, vocab_size=VOCAB, eos_id=1, pad_id=0, seed=3, empty=parallel.rank() > 0)
    return Learner(config, model, method or compose(config.algorithm), device="cpu", directory=directory)


def groups(count: int, seed: int = 0) -> list[Group]:
    """Groups of four completions of 1 to 6 random tokens, sampled at version 0 with likelihood 1/e a token."""
    rng = np.random.default_rng(seed)
    return [_group(rng, number) for number in range(count)]


def _group(rng: np.random.Generator, number: int) -> Group:
    lengths = rng.integers(1, 7, 4).tolist()
    total = sum(lengths)
    return Group(
        kind="train",
        group_id=number,
        attempt=0,
        incarnation=0,
        generator="g",
        domain="d",
        lease_version=0,
        temperature=1.0,
        prompt_ids=rng.integers(2, VOCAB, 5).astype(np.int32),
        lengths=lengths,
        finish=["stop"] * 4,
        verdicts=[Verdict.of(1.0)] * 4,
        token_ids=rng.integers(1, VOCAB, total).astype(np.int32),
        logprobs=np.full(total, -1.0, np.float32),
        versions=np.zeros(total, np.int32),
        loss_mask=np.ones(total, np.uint8),
    )


def take(config: Config, batch: list[Group], num_ranks: int = 1) -> list[Update]:
    """`batch` packed as the learner of `config` wants it, with the same four advantages in every group."""
    return pack(
        batch,
        [FIXED.numpy() for _ in batch],
        version=0,
        max_staleness=4,
        num_ranks=num_ranks,
        budget=config.learner.tokens_per_micro_batch,
        share_prefix=config.learner.share_prefix,
        num_updates=config.learner.updates_per_step,
    )


def on_ranks(num_ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, *arguments)` in `num_ranks` processes that are one gloo group; their results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_on_rank, (num_ranks, folder, work, arguments), nprocs=num_ranks, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(num_ranks)]


def _on_rank(rank: int, num_ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    torch.save(work(rank, *arguments), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def alone(model: Any, group: Group, temperature: float = 1.0) -> list[Tensor]:
    """The log-probabilities of each of `group`'s completions from a plain forward of it alone."""
    ends = np.cumsum([0, *group.lengths])
    scores = []
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        ids = np.concatenate([group.prompt_ids, group.token_ids[first:last]]).astype(np.int64)
        token_ids, size = torch.from_numpy(ids), len(ids)
        layout = Layout(np.array([0, size]))
        hidden = hidden_states(model, token_ids, torch.arange(size), layout)
        start = len(group.prompt_ids)
        logits = lm_head(model)(hidden[start - 1 : -1]) / temperature
        scores.append(torch.log_softmax(logits, -1).gather(1, token_ids[start:, None]).squeeze(1))
    return scores

"""Supervised training on (prompt, answer) pairs, for models made on the spot; cached by content."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine import fusion
from engine.attention import Layout
from engine.config import Config
from engine.model import hidden_states, lm_head
from engine.policy import named_tensors
from engine.process import StopSignal
from engine.prompts import Prompts

FORMAT = 2  # part of the cache's key: raise it when this file trains differently


def warm_start(
    config: Config,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop: StopSignal,
    say: Callable[[str], None] = print,
) -> None:
    """Trains `policy` in place by cross-entropy on the answers, or the columns `demonstration` where there are such, of
    `warm_start.steps` batches of training prompts, learning rate rising linearly and then constant; or loads what an
    equal call trained before.

    A share `warm_start.noise` of the demonstrations carries the answer of another prompt. The held-out prompts are
    never among them. Raises `Stopped` where `stop` asks for it.
    """
    cached = Path(config.warm_start.cache) / f"{_key(config, policy)}.safetensors"
    if cached.exists():
        say(f"warm start from {cached}")
        _restore(policy, load_file(cached))
        return
    started = time.monotonic()
    say(f"warm start: {config.warm_start.steps} supervised steps of {config.warm_start.batch_size} demonstrations")
    fusion.use(policy, config.ops.backend, policy.device)
    loss = _train(config, policy, tokenizer, Prompts(_demonstrated(config), tokenizer), stop)
    _write(policy, cached)
    say(f"warm start took {time.monotonic() - started:.0f} s, last loss {loss:.3f}; kept as {cached}")


def _key(config: Config, policy: PreTrainedModel) -> str:
    """A digest of all that the result depends on: settings, data files, the weights before."""
    files = [path for domain in config.domains for path in (domain.path, domain.eval_path) if path]
    parts = [
        FORMAT,
        torch.__version__,
        config.run.seed,
        msgspec.to_builtins(config.model),
        msgspec.to_builtins(msgspec.structs.replace(config.warm_start, cache="")),
        msgspec.to_builtins(_demonstrated(config).domains),
        [xxhash.xxh3_64_hexdigest(Path(path).read_bytes()) for path in files],
        [xxhash.xxh3_64_hexdigest(_bytes(tensor)) for _, tensor in named_tensors(policy)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _demonstrated(config: Config) -> Config:
    """`config` with all that concerns rewards left out: demonstrations carry true answers, also in a control run."""
    plain = {"reward": "exact", "reward_options": {}}
    domains = [msgspec.structs.replace(domain, **plain) for domain in config.domains]
    return msgspec.structs.replace(config, domains=domains)


def _train(
    config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, stop: StopSignal
) -> float:
    settings = config.warm_start
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    random = np.random.default_rng(config.run.seed)
    policy.train()
    last = 0.0
    for step in range(settings.steps):
        if stop.asked:
            raise stop.error()
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        pairs = [_demonstration(tokenizer, prompts) for _ in range(settings.batch_size)]
        loss = _loss(policy, _noisy(pairs, settings.noise, random))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = float(loss.detach())
    policy.eval()
    return last


def _demonstration(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> tuple[np.ndarray, list[int]]:
    prompt = prompts.prompt(*prompts.draw())
    shown = str(prompt.fields.get("demonstration", prompt.answer))
    answer = tokenizer(shown, add_special_tokens=False)["input_ids"]
    return prompt.token_ids, [*answer, tokenizer.eos_token_id]  # pyright: ignore[reportReturnType]


def _noisy(
    pairs: list[tuple[np.ndarray, list[int]]], noise: float, random: np.random.Generator
) -> list[tuple[np.ndarray, list[int]]]:
    """`pairs`, of which a share `noise` has the answer of the next pair."""
    wrong = random.random(len(pairs)) < noise
    return [
        (prompt, pairs[(number + 1) % len(pairs)][1] if wrong[number] else answer)
        for number, (prompt, answer) in enumerate(pairs)
    ]


def _loss(policy: PreTrainedModel, pairs: list[tuple[np.ndarray, list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, in one flat forward without padding."""
    flat = np.concatenate([np.concatenate([prompt, answer[:-1]]) for prompt, answer in pairs]).astype(np.int64)
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer in pairs]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths])
    rows = np.concatenate(
        [np.arange(end - len(answer), end) for (_, answer), end in zip(pairs, bounds[1:], strict=True)]
    )
    targets = np.concatenate([answer for _, answer in pairs])
    hidden = hidden_states(policy, torch.from_numpy(flat), torch.from_numpy(positions), Layout(bounds))
    logits = lm_head(policy)(hidden[torch.from_numpy(rows)])
    return nn.functional.cross_entropy(logits.float(), torch.from_numpy(targets))


def _restore(policy: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in named_tensors(policy):
            tensor.copy_(tensors[name])


def _write(policy: PreTrainedModel, path: Path) -> None:
    """Whole or not at all: two jobs may train the same warm start at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in named_tensors(policy)}, temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)

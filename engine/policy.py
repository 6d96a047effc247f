"""The policy as the learner sees it: flat tokens in, log-probabilities of the targets or a loss out."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from engine.algorithms.method import Tokens
from engine.attention import Layout
from engine.config import Config, ConfigError
from engine.head import Head
from engine.model import hidden_states, lm_head
from engine.packer import MicroBatch
from engine.weights import Manifest


@dataclass(frozen=True)
class Batch:
    """A `MicroBatch` as tensors on the learner's device."""

    token_ids: Tensor  # int64 [T], at least one
    position_ids: Tensor  # int64 [T]
    layout: Layout
    rows: Tensor  # int64 [N], the flat position whose logits predict each target, a part of the micro-batch's
    targets: Tensor  # int64 [N]
    tokens: Tokens
    temperature: Tensor  # float [N], at which each target was sampled
    version: Tensor  # int32 [N], the weights that sampled each target
    solved: Tensor  # bool [S], the completion did its task

    @classmethod
    def of(cls, micro: MicroBatch, device: torch.device, wanted: np.ndarray | None = None) -> "Batch":
        """`wanted`, bool [N], picks targets; without it the masked ones, which nothing asks for, are left out.

        An empty micro-batch becomes one token without a target: its rank takes part in every collective with a
        gradient of zero.
        """
        kept = np.flatnonzero(micro.mask != 0 if wanted is None else wanted)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        inputs, positions, cu_seqlens, prefix = micro.token_ids, micro.position_ids, micro.cu_seqlens, micro.prefix
        if len(inputs) == 0:
            inputs = positions = np.zeros(1, np.int64)
            cu_seqlens, prefix = np.array([0, 1], np.int32), np.array([-1], np.int32)
        return cls(
            token_ids=tensor(inputs),
            position_ids=tensor(positions),
            layout=Layout(cu_seqlens, prefix),
            rows=tensor(micro.rows[kept]),
            targets=tensor(micro.targets[kept]),
            tokens=Tokens(
                behaviour=tensor(micro.behaviour[kept]),
                advantage=tensor(micro.advantage[kept]),
                mask=tensor(micro.mask[kept]),
                sequence=tensor(micro.sequence[kept]),
                lengths=tensor(micro.lengths),
            ),
            temperature=tensor(micro.temperature[kept]),
            version=tensor(micro.version[kept]),
            solved=tensor(micro.solved),
        )


class Policy(nn.Module):
    """A causal language model with head, log-probabilities and loss inside one forward.

    FSDP2 gathers the root's parameters, the head's among them, for the time of this forward and of its backward
    only; a head or a loss outside would see shards.
    """

    def __init__(self, model: PreTrainedModel, head: Head, temperature: float):
        """`head` divides logits by `temperature`; hidden states make up for what a token was sampled at otherwise."""
        super().__init__()
        self.model = model
        self._head = head
        self._temperature = temperature

    def forward(self, batch: Batch, tokens: Tokens | None = None, *, read: bool = False, **counts: int) -> Any:
        """(log-probability [N], entropy [N]) of the targets; or of `tokens`, the batch's with what else is known of
        them, (loss, sums): see `Method.loss`, which explains `counts`; or to `read`, the hidden states [N, H]."""
        hidden = hidden_states(self.model, batch.token_ids, batch.position_ids, batch.layout)
        hidden = hidden.index_select(0, batch.rows)
        if read:
            return hidden
        hidden.mul_((self._temperature / batch.temperature).unsqueeze(1))  # in float32 before it is rounded
        if tokens is None:
            return self._head.score(hidden, batch.targets)
        return self._head.loss(hidden, batch.targets, tokens, **counts)


@torch.no_grad()
def logprob(policy: Policy, batch: Batch) -> Tensor:
    """The log-probabilities [N] of the batch's targets under the policy's present weights."""
    return policy(batch)[0]


def with_advantage(micro: MicroBatch) -> np.ndarray:
    """Which targets train at all, bool [N]: unmasked ones of completions that have an advantage somewhere.

    Of a completion all are kept or none, because losses and corrections may look at it as a whole.
    """
    unmasked = micro.mask != 0
    trains = np.zeros(micro.num_sequences, np.bool_)
    trains[micro.sequence[unmasked & (micro.advantage != 0)]] = True
    return unmasked & trains[micro.sequence]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers, in order: the units of sharding and of activation checkpointing."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def recompute_activations(model: nn.Module) -> None:
    """Keeps only each block's input for backward and computes its inside twice; parameter names stay as they are.

    Raises `ConfigError` for a model that does not say what its layers are.
    """
    repeated = blocks(model)
    if not repeated:
        raise ConfigError(f"learner.activation_checkpointing: {type(model).__name__} does not name its layers")
    for block in repeated:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters and saved buffers by their Hugging Face names, a tied one once under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def manifest_of(model: PreTrainedModel, config: Config) -> Manifest:
    """How the model's weights travel: in the generators' dtype, the head in float32 where that is asked for and kept:
    SGLang computes it in float32 from a weight in the generators' dtype."""
    keeps = config.model.fp32_head and config.generator.engine == "embedded"
    head = {id(tensor) for tensor in lm_head(model).parameters()} if keeps else ()
    wide = [name for name, tensor in model.named_parameters() if id(tensor) in head]
    return Manifest.of(named_tensors(model), getattr(torch, config.generator.dtype), wide=wide)

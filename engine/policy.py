"""The policy as the learner sees it: flat tokens in, log-probabilities of the targets or a loss out."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from engine.algorithms.method import Tokens
from engine.attention import Layout
from engine.model import hidden_states, lm_head
from engine.packer import MicroBatch

LOGITS_AT_ONCE = 2**26  # elements of the logits matrix that may exist at a time; more are computed twice in pieces


@dataclass(frozen=True)
class Batch:
    """A `MicroBatch` as tensors on the learner's device."""

    token_ids: Tensor  # int64 [T], at least one
    position_ids: Tensor  # int64 [T]
    layout: Layout
    rows: Tensor  # int64 [N], the flat position whose logits predict each target
    targets: Tensor  # int64 [N]
    tokens: Tokens
    version: Tensor  # int32 [N], the weights that sampled each target

    @classmethod
    def of(cls, micro: MicroBatch, device: torch.device) -> "Batch":
        """An empty micro-batch becomes one token without a target: its rank takes part in every collective with a
        gradient of zero."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        inputs, positions, cu_seqlens, prefix = micro.token_ids, micro.position_ids, micro.cu_seqlens, micro.prefix
        if len(inputs) == 0:
            inputs = positions = np.zeros(1, np.int64)
            cu_seqlens, prefix = np.array([0, 1], np.int32), np.array([-1], np.int32)
        return cls(
            token_ids=tensor(inputs),
            position_ids=tensor(positions),
            layout=Layout(cu_seqlens, prefix, device),
            rows=tensor(micro.rows),
            targets=tensor(micro.targets),
            tokens=Tokens(
                behaviour=tensor(micro.behaviour),
                advantage=tensor(micro.advantage),
                mask=tensor(micro.mask),
                sequence=tensor(micro.sequence),
                lengths=tensor(micro.lengths),
            ),
            version=tensor(micro.version),
        )


Objective = Callable[[Tensor, Tensor], Any]  # (log-probabilities [N], entropies [N]) -> what forward returns


class Policy(nn.Module):
    """A causal language model with head, log-probabilities and loss inside one forward.

    FSDP2 gathers the root's parameters, the head's among them, for the time of this forward and of its backward
    only; a head or a loss outside would see shards.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, entropy_gradient: bool = False):
        super().__init__()
        self.model = model
        self._num_logits = lm_head(model).get_parameter("weight").shape[0]
        self._temperature = temperature
        self._entropy_gradient = entropy_gradient

    def forward(self, batch: Batch, objective: Objective | None = None) -> Any:
        """(log-probability [N], entropy [N]) of the targets, or what `objective` makes of them.

        Both are those of softmax(logits / temperature), in nats, in float32 at least. The entropy carries a gradient
        only where the loss uses it.
        """
        hidden = hidden_states(self.model, batch.token_ids, batch.position_ids, batch.layout)
        logprob, entropy = self._score(hidden.index_select(0, batch.rows), batch.targets)
        return (logprob, entropy) if objective is None else objective(logprob, entropy)

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, from the hidden states [N, H] that predict `targets` [N]."""
        rows = max(1, LOGITS_AT_ONCE // self._num_logits)
        if len(targets) <= rows:
            return self._score_rows(hidden, targets)
        pieces = [
            checkpoint(self._score_rows, *piece, use_reentrant=False)
            for piece in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_rows(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(self.model)(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._temperature != 1.0:
            logits = logits / self._temperature
        distribution = torch.log_softmax(logits, dim=-1)
        logprob = distribution.gather(1, targets.unsqueeze(1)).squeeze(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._entropy_gradient):
            entropy = -(distribution.exp() * distribution).sum(dim=-1)
        return logprob, entropy


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers, in order: the units of sharding and of activation checkpointing."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def recompute_activations(model: nn.Module) -> None:
    """Keeps only each block's input for backward and computes its inside twice; parameter names stay as they are."""
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters and saved buffers by their Hugging Face names, a tied one once under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()

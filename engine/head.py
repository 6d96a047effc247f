"""The last step of the policy: from the hidden states that predict the targets to log-probabilities and a loss."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.algorithms.method import Method, Tokens

LOGITS_AT_ONCE = 2**26  # elements of the logits matrix that may exist at a time; more are computed twice in pieces

Loss = tuple[Tensor, dict[str, Tensor]]  # and the sums of `Method.loss`


@dataclass(frozen=True)
class Objective:
    """What the loss of a micro-batch is made of, beside the policy's own log-probabilities."""

    method: Method
    tokens: Tokens
    num_tokens: int  # of the whole update
    num_sequences: int

    def loss(self, logprob: Tensor, entropy: Tensor) -> Loss:
        return self.method.loss(
            logprob, entropy, self.tokens, num_tokens=self.num_tokens, num_sequences=self.num_sequences
        )


class Head(Protocol):
    """A language model's head at a temperature; hidden [N, H] predict targets int64 [N].

    Log-probabilities and entropies are those of softmax(logits / temperature), in nats, in float32 at least.
    """

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability [N], entropy [N])."""
        ...

    def loss(self, hidden: Tensor, targets: Tensor, objective: Objective) -> Loss:
        """The objective's loss, with its gradient, and its sums."""
        ...


class Reference:
    """Logits in plain torch, for a head of any kind."""

    def __init__(self, module: nn.Module, temperature: float):
        self._module = module
        self._temperature = temperature
        self._rows = max(1, LOGITS_AT_ONCE // module.get_parameter("weight").shape[0])

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._score(hidden, targets, entropy_gradient=False)

    def loss(self, hidden: Tensor, targets: Tensor, objective: Objective) -> Loss:
        return objective.loss(*self._score(hidden, targets, entropy_gradient=objective.method.needs_entropy))

    def _score(self, hidden: Tensor, targets: Tensor, *, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        if len(targets) <= self._rows:
            return self._score_rows(hidden, targets, entropy_gradient)
        pieces = [
            checkpoint(self._score_rows, *piece, entropy_gradient, use_reentrant=False)
            for piece in zip(hidden.split(self._rows), targets.split(self._rows), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_rows(self, hidden: Tensor, targets: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        logits = self._module(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._temperature != 1.0:
            logits = logits / self._temperature
        distribution = torch.log_softmax(logits, dim=-1)
        logprob = distribution.gather(1, targets.unsqueeze(1)).squeeze(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
            entropy = -(distribution.exp() * distribution).sum(dim=-1)
        return logprob, entropy

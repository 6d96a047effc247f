"""The last step of the policy: from the hidden states that predict the targets to log-probabilities and a loss."""

import warnings
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.algorithms.method import Method, Tokens
from engine.algorithms.segments import Segments
from engine.ops import library
from engine.ops import loss as ops

LOGITS_AT_ONCE = 2**26  # elements of the logits matrix that may exist at a time; more are computed twice in pieces

Scores = tuple[Tensor, Tensor]  # log-probability [N], entropy [N]
Loss = tuple[Tensor, dict[str, Tensor]]  # of one micro-batch, and its health as sums: see `Method.loss`


class Head(Protocol):
    """A language model's head at a temperature, and the loss of a method. Hidden [N, H] predict targets int64 [N].

    Log-probabilities and entropies are those of softmax(logits / temperature), in nats, in float32 at least.
    """

    def __init__(self, module: nn.Module, temperature: float, method: Method): ...

    @staticmethod
    def memory(rows: int, vocab: int, width: int, device: str) -> int:
        """Bytes that a loss over so many rows takes beside hidden states, weight and their gradients, about."""
        ...

    def score(self, hidden: Tensor, targets: Tensor) -> Scores: ...

    def loss(self, hidden: Tensor, targets: Tensor, tokens: Tokens, *, num_tokens: int, num_sequences: int) -> Loss: ...


class Reference:
    """Logits and loss in plain torch, for a head of any kind."""

    def __init__(self, module: nn.Module, temperature: float, method: Method):
        self._module, self._temperature, self._method = module, temperature, method
        self._rows = max(1, LOGITS_AT_ONCE // module.get_parameter("weight").shape[0])

    @staticmethod
    def memory(rows: int, vocab: int, width: int, device: str) -> int:
        return min(rows * vocab, LOGITS_AT_ONCE) * 3 * 4

    def score(self, hidden: Tensor, targets: Tensor) -> Scores:
        if len(targets) <= self._rows:
            return self._score_rows(hidden, targets)
        pieces = [
            checkpoint(self._score_rows, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(hidden.split(self._rows), targets.split(self._rows), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def loss(self, hidden: Tensor, targets: Tensor, tokens: Tokens, *, num_tokens: int, num_sequences: int) -> Loss:
        scores = self.score(hidden, targets)
        return self._method.loss(*scores, tokens, num_tokens=num_tokens, num_sequences=num_sequences)

    def _score_rows(self, hidden: Tensor, targets: Tensor) -> Scores:
        logits = self._module(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._temperature != 1.0:
            logits = logits / self._temperature
        distribution = torch.log_softmax(logits, dim=-1)
        logprob = distribution.gather(1, targets.unsqueeze(1)).squeeze(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._method.needs_entropy):
            entropy = -(distribution.exp() * distribution).sum(dim=-1)
        return logprob, entropy


class Fused:
    """The compiled kernels, for a linear head without a bias: the logits never exist as a whole.

    A method with a slot or a term of which the kernels know nothing has its loss in plain torch, on their
    log-probabilities.
    """

    def __init__(self, module: nn.Module, temperature: float, method: Method):
        self._module, self._temperature, self._method = module, temperature, method
        divergence = method.divergence if method.needs_reference else None
        slots = method.surrogate, method.correction, divergence, method.entropy_coefficient
        self._recipe = None if method.imitation_coefficient else ops.Recipe.of(*slots)

    @staticmethod
    def memory(rows: int, vocab: int, width: int, device: str) -> int:
        chunk = ops.chunk_bytes(device.partition(":")[0], vocab * width)
        return min(rows * vocab * 4, chunk) + vocab * width * 4

    @property
    def _weight(self) -> Tensor:
        return self._module.get_parameter("weight")  # not kept: FSDP exchanges it

    def score(self, hidden: Tensor, targets: Tensor) -> Scores:
        return ops.linear_stats(hidden, self._weight, targets, temperature=self._temperature)

    def loss(self, hidden: Tensor, targets: Tensor, tokens: Tokens, *, num_tokens: int, num_sequences: int) -> Loss:
        if self._recipe is None:
            scores = self.score(hidden, targets)
            return self._method.loss(*scores, tokens, num_tokens=num_tokens, num_sequences=num_sequences)
        completions = tokens.completions(torch.promote_types(hidden.dtype, torch.float32))
        omega = self._method.aggregate(completions, tokens.lengths, num_tokens, num_sequences)
        known = _known(tokens, completions, omega)
        loss = ops.linear_token_loss(
            hidden, self._weight, targets, known, self._recipe, temperature=self._temperature, num_bins=1
        )
        unread = {"loss"} if self._method.needs_reference else {"loss", "kl"}
        health = zip(ops.HEALTH, loss.health, strict=False)  # the staleness histogram stands behind
        return loss.loss, {name: total for name, total in health if name not in unread}


def _known(tokens: Tokens, completions: Segments, omega: Tensor) -> ops.Tokens:
    """`tokens` as the kernels read them: bounds of the completions, all numbers of the type of omega."""

    def number(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(omega.dtype)

    numbers = torch.arange(completions.num + 1, device=omega.device)
    return ops.Tokens(
        behaviour=tokens.behaviour.to(omega.dtype),
        advantage=tokens.advantage.to(omega.dtype),
        mask=completions.mask,
        omega=omega,
        cu_seqlens=torch.searchsorted(tokens.sequence, numbers, out_int32=True),
        proximal=number(tokens.proximal),
        reference=number(tokens.reference),
        staleness=tokens.staleness,
        moved=tokens.moved,
    )


HEADS: dict[str, type[Head]] = {"fused": Fused, "reference": Reference}


def head_of(module: nn.Module, backend: str, device: torch.device, temperature: float, method: Method) -> Head:
    """`module` as `backend` computes it on `device`. Warns where the kernels cannot, and takes the reference."""
    obstacle = _obstacle(module, device.type) if backend == "fused" else ""
    if obstacle:
        warnings.warn(f"ops.backend = 'fused': {obstacle}; taking 'reference'", stacklevel=2)
        backend = "reference"
    return HEADS[backend](module, temperature, method)


def is_matrix(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.bias is None


def _obstacle(module: nn.Module, device: str) -> str:
    """Why the kernels cannot compute `module` on `device`; empty where they can."""
    if not is_matrix(module):
        return "the model's head is more than a matrix"
    built = device == "cpu" or (device == "cuda" and library.cuda_is_built())
    return "" if built else f"there are no kernels for {device}, whose compiler was not found when this was installed"

"""The token loss, from logits or from hidden states and the head's weight, whatever the method's slots.

    loss = sum over tokens of  omega * (w * phi + beta * k - eta * H)

    row_stats, linear_stats         log-probability and entropy, differentiable: for any loss that torch can write
    token_loss, linear_token_loss   the losses of engine.algorithms as one operation, gradient included
    token_loss_                     the same on the spot: logits become their gradient

Every loss on sampled tokens is, for its gradient, two numbers a row: its slopes by the log-probability and by the
entropy. The `linear` ones use that to go without the [N, V] matrix of logits, of which only a chunk of rows exists at a
time. All of them compute in float32, in float64 for float64, and give the same bits on any number of threads.

Raises `ValueError` naming the argument that is wrong. On CUDA, where asking would wait for the device, a target out of
range gives its row NaN, and wrong `cu_seqlens` the loss.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.ops import library  # noqa: F401  (registers the operators)

_ops = torch.ops.leeway

HEALTH: tuple[str, ...] = tuple(_ops.health_names())  # the sums in `TokenLoss.health`; the staleness histogram follows

# Bytes of the rows of logits, and of their gradient, that exist at a time. On the CPU a chunk is large enough for its
# matrix products to be as fast as whole ones and small beside the head's gradient; a GPU needs thousands of rows, since
# each chunk reads and writes the weight's gradient once. Beside a very large gradient a chunk may grow with it.
CHUNK_BYTES = {"cpu": 80_000_000, "cuda": 900_000_000}
CHUNK_SHARE = 0.1  # of the gradient of the weight, in float32

Slot = tuple[str, tuple[float, ...]]  # a function of engine.algorithms and its keyword arguments in order; None is NaN


@dataclass(frozen=True)
class Recipe:
    """A method's loss as the kernels know it."""

    surrogate: Slot
    correction: Slot = ("none", ())
    divergence: Slot | None = None
    entropy_coefficient: float = 0.0

    @classmethod
    def of(
        cls, surrogate: Callable, correction: Callable, divergence: Callable | None, entropy_coefficient: float
    ) -> "Recipe | None":
        """The recipe of these slots' functions, partials that bind keyword arguments alone; None where one has no
        kernel."""
        phi, w = _slot("surrogate", surrogate), _slot("correction", correction)
        k = None if divergence is None else _slot("divergence", divergence)
        if phi is None or w is None or (k is None and divergence is not None):
            return None
        return cls(phi, w, k, entropy_coefficient)

    def arguments(self) -> tuple[Any, ...]:
        """What the operators take for it."""
        divergence = ("none", ()) if self.divergence is None else self.divergence
        return (*self.surrogate, *self.correction, *divergence, self.entropy_coefficient)


def _slot(kind: str, function: Callable) -> Slot | None:
    bound = function if isinstance(function, partial) else partial(function)
    name = getattr(bound.func, "__name__", "")
    ours = getattr(bound.func, "__module__", "").startswith("engine.algorithms.")
    if not ours or bound.args or name not in _ops.slot_names(kind):
        return None
    parameters = inspect.signature(bound.func).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | bound.keywords
    return name, tuple(float("nan") if value is None else float(value) for value in keywords.values())


@dataclass(frozen=True)
class Tokens:
    """What is known of N target tokens, in S completions one after the other, before the policy sees them.

    Numbers are float32, float64 where the logits or hidden states are. `proximal` may be left out where the policy is
    the proximal one itself, and is not read without a correction: then `behaviour` is the proximal policy.
    """

    behaviour: Tensor  # [N]: log-probability under the version that sampled the token
    advantage: Tensor  # [N]
    mask: Tensor  # [N]: 0 for tokens that do not train
    omega: Tensor  # [N]: what the token counts in the loss, 0 where masked
    cu_seqlens: Tensor  # int32 [S + 1], from 0 to N
    proximal: Tensor | None = None  # [N]
    reference: Tensor | None = None  # [N]
    staleness: Tensor | None = None  # int32 [N]: the policy's version less the token's; None: no token is its own
    moved: bool = False  # the policy was updated since its version was made: no token is its own any more

    def arguments(self, recipe: Recipe) -> tuple[Any, ...]:
        """What the operators take for them."""
        proximal = self.behaviour if recipe.correction[0] == "none" else self.proximal
        known = (self.behaviour, proximal, self.reference, self.advantage, self.mask, self.omega)
        return (self.cu_seqlens, *known, self.staleness, self.moved)


class TokenLoss(NamedTuple):
    """Only `loss` has a gradient; masked tokens have 0 everywhere. `health` sums over the others what `HEALTH` names;
    then come the numbers of tokens that are 0, 1, 2, ... versions old, the last bin open."""

    loss: Tensor  # scalar
    logprob: Tensor  # [N] log softmax(logits / temperature) of the target
    entropy: Tensor  # [N] of softmax(logits / temperature), in nats
    ratio: Tensor  # [N] pi / pi_proximal as the surrogate clips it
    coefficient: Tensor  # [N] d loss / d logprob
    health: Tensor  # float64 [len(HEALTH) + num_bins]


# ---- From logits -------------------------------------------------------------------------------------------------


def row_stats(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, lse) [N] of logits [N, V] and targets int64 [N].

    logprob = log softmax(logits / temperature)[target] and entropy, in nats, are differentiable; lse, the log-sum-exp
    of logits / temperature, is not.
    """
    return _ops.row_stats(logits, targets, temperature)


def token_loss(
    logits: Tensor, targets: Tensor, tokens: Tokens, recipe: Recipe, *, temperature: float = 1.0, num_bins: int = 16
) -> TokenLoss:
    """The loss of logits [N, V] and targets int64 [N]. Its gradient is made with it, so backward runs once a graph."""
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    arguments = (*tokens.arguments(recipe), *recipe.arguments(), num_bins, temperature)
    return TokenLoss(*_ops.token_loss(logits, targets, *arguments, wants_grad, True)[:6])


def token_loss_(
    logits: Tensor, targets: Tensor, tokens: Tokens, recipe: Recipe, *, temperature: float = 1.0, num_bins: int = 16
) -> TokenLoss:
    """As `token_loss`, outside of autograd: `logits` become d loss / d logits in place."""
    arguments = (*tokens.arguments(recipe), *recipe.arguments(), num_bins, temperature)
    return TokenLoss(*_ops.token_loss_(logits, targets, *arguments))


# ---- From hidden states ------------------------------------------------------------------------------------------


def linear_stats(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) [N] of hidden states [N, H], the head's weight [V, H] and targets int64 [N].

    As `row_stats` of hidden @ weight.T, which backward makes a second time for the rows that have a gradient. The
    products take hidden states in the weight's type, on the CPU in float32 at least.
    """
    memory = chunk_bytes(weight.device.type, weight.numel())
    logprob, entropy, _ = _ops.linear_stats(hidden, weight, targets, temperature, memory)
    return logprob, entropy


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: Tokens,
    recipe: Recipe,
    *,
    temperature: float = 1.0,
    num_bins: int = 16,
    health_of_all: bool = True,
) -> TokenLoss:
    """As `token_loss` of hidden @ weight.T, at the cost of three matrix products of the rows that need them.

    Masked rows take part in none. Rows without slopes, the clipped ones among them, take part in
    the first alone. Without `health_of_all`, neither do tokens that cannot have a slope, for an omega of 0 or, without
    divergence and entropy bonus, an advantage of 0 (where the recipe looks at sequences, only whole ones are left out):
    they return 0 too and are missing in `health`. Where the recipe looks at sequences, the rows of one that is longer
    than a chunk pass the first product twice.
    """
    grad = torch.is_grad_enabled()
    wants = [grad and hidden.requires_grad, grad and weight.requires_grad]
    arguments = (*tokens.arguments(recipe), *recipe.arguments(), num_bins, temperature)
    memory = chunk_bytes(weight.device.type, weight.numel())
    outputs = _ops.linear_token_loss(hidden, weight, targets, *arguments, health_of_all, memory, wants, True)
    return TokenLoss(*outputs[:6])


def chunk_bytes(device: str, num_weights: int) -> int:
    """Bytes of a chunk of rows, for a head of so many weights."""
    return max(CHUNK_BYTES[device], int(num_weights * 4 * CHUNK_SHARE))


# ---- What torch wants to know of an operator ---------------------------------------------------------------------


def _row_stats_fake(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return tuple(_vector(logits) for _ in range(3))


def _row_stats_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.temperature = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, targets, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _row_stats_backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple:
    logits, targets, lse, entropy = ctx.saved_tensors
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(lse)
    grad = _ops.row_grad(logits, targets, lse, entropy, grad_logprob, grad_entropy, ctx.temperature)
    return grad, None, None


def _row_grad_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_loss_fake(logits: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, num_bins, _, wants_grad, _ = arguments
    return *_loss_fake(logits, num_bins), logits.new_empty(logits.shape if wants_grad else 0)


def _token_loss__fake(logits: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, num_bins, _ = arguments
    return _loss_fake(logits, num_bins)


def _token_loss_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.reuse = inputs[-1]
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_loss_backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple:
    (grad,) = ctx.saved_tensors
    return _scaled(grad, grad_loss, ctx.reuse), *[None] * (ctx.num_inputs - 1)


def _scaled(grad: Tensor, factor: Tensor, reuse: bool) -> Tensor:
    """`grad`, as large as the logits or the head, times the scalar `factor`; in place, a second backward raises.

    A loss that is the end of its graph has a factor of 1, for which the CPU saves itself the pass. Looking at it would
    wait for a GPU, and is no part of a graph that is being compiled.
    """
    if not reuse:
        return grad * factor
    if type(factor) is Tensor and factor.device.type == "cpu" and factor == 1:
        torch.autograd.graph.increment_version(grad)
        return grad
    return grad.mul_(factor)


def _linear_stats_fake(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, memory: int) -> tuple:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=_wide(weight.dtype)) for _ in range(3))


def _linear_stats_backward_fake(hidden: Tensor, weight: Tensor, targets: Tensor, *arguments: Any) -> tuple:
    return _factors_fake(hidden, weight, arguments[-1])


def _linear_stats_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, ctx.temperature, ctx.memory = inputs
    _, entropy, lse = output
    ctx.save_for_backward(hidden, weight, targets, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _linear_stats_backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple:
    hidden, weight, targets, lse, entropy = ctx.saved_tensors
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(lse)
    wants = [*ctx.needs_input_grad[:2]]
    d_hidden, d_weight = _ops.linear_stats_backward(
        hidden, weight, targets, lse, entropy, grad_logprob, grad_entropy, ctx.temperature, ctx.memory, wants
    )
    return d_hidden if wants[0] else None, d_weight.to(weight.dtype) if wants[1] else None, None, None, None


def _linear_token_loss_fake(hidden: Tensor, weight: Tensor, targets: Tensor, *arguments: Any) -> tuple:
    *_, num_bins, _, _, _, wants, _ = arguments
    rows = hidden.new_empty(hidden.shape, dtype=_wide(weight.dtype))
    return *_loss_fake(rows, num_bins), *_factors_fake(hidden, weight, wants)


def _linear_token_loss_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[-2:])
    ctx.reuse = inputs[-1]
    ctx.weight_dtype = inputs[1].dtype
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_token_loss_backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple:
    d_hidden, d_weight = ctx.saved_tensors
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    return (
        _scaled(d_hidden, grad_loss, ctx.reuse) if wants_hidden else None,
        _scaled(d_weight, grad_loss, ctx.reuse).to(ctx.weight_dtype) if wants_weight else None,
        *[None] * (ctx.num_inputs - 2),
    )


def _factors_fake(hidden: Tensor, weight: Tensor, wants: list[bool]) -> tuple[Tensor, Tensor]:
    wants_hidden, wants_weight = wants
    d_weight = weight.new_empty(weight.shape if wants_weight else 0, dtype=_wide(weight.dtype))
    return hidden.new_empty(hidden.shape if wants_hidden else 0), d_weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _vector(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=_wide(rows.dtype))


def _loss_fake(rows: Tensor, num_bins: int) -> tuple[Tensor, ...]:
    health = rows.new_empty(len(HEALTH) + num_bins, dtype=torch.float64)
    return rows.new_empty((), dtype=_wide(rows.dtype)), *(_vector(rows) for _ in range(4)), health


for name, fake in {
    "row_stats": _row_stats_fake,
    "row_grad": _row_grad_fake,
    "token_loss": _token_loss_fake,
    "token_loss_": _token_loss__fake,
    "linear_stats": _linear_stats_fake,
    "linear_stats_backward": _linear_stats_backward_fake,
    "linear_token_loss": _linear_token_loss_fake,
}.items():
    torch.library.register_fake(f"leeway::{name}", fake)

for name, (backward, context) in {
    "row_stats": (_row_stats_backward, _row_stats_context),
    "token_loss": (_token_loss_backward, _token_loss_context),
    "linear_stats": (_linear_stats_backward, _linear_stats_context),
    "linear_token_loss": (_linear_token_loss_backward, _linear_token_loss_context),
}.items():
    torch.library.register_autograd(f"leeway::{name}", backward, setup_context=context)

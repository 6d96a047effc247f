"""Per-token streams to the packed axis and back, reductions over packed sequences, generalised advantages.

    pack, unpack                               streams between the packed axis and wherever sequences lie apart
    token_layout                               positions, labels, mask and sequence of packed tokens
    segment_sum, segment_mean, segment_max     [N] -> [S]
    gae                                        rewards and values -> advantages and returns

On the packed axis sequence i is the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]`, int32 or int64 [S + 1], rising from
0 to N; sequences may be empty. All tensors are contiguous and on one device. The same input gives the same bits, on any
number of threads.

Raises `ValueError` naming the argument that is wrong. What `cu_seqlens` and `starts` hold is checked on the CPU. On
CUDA looking would wait for the device: nothing outside the tensors is touched, but wrong bounds give wrong numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.ops import library  # noqa: F401  (registers the operators)

_ops = torch.ops.leeway


class TokenLayout(NamedTuple):
    """Columns [N] of packed tokens."""

    position_ids: Tensor  # int64, from 0 in each sequence
    labels: Tensor  # int64, the sequence's next token where that is of the completion, else -100
    mask: Tensor  # float32, 1 where it is, else 0
    sequence: Tensor  # int64, 0 .. S - 1


def pack(streams: Sequence[Tensor], starts: Tensor, cu_seqlens: Tensor, num_tokens: int | None = None) -> list[Tensor]:
    """Each stream's values [N]: those of sequence i begin at `starts[i]`, int64 [S], of the flattened stream.

    Streams have the same number of elements, of 1, 2, 4 or 8 bytes, and any shape. `num_tokens` is N; left out, it is
    looked up in `cu_seqlens`, for which a GPU must be waited. Carries no gradient.
    """
    return _ops.pack(streams, starts, cu_seqlens, int(cu_seqlens[-1]) if num_tokens is None else num_tokens)


def unpack(
    streams: Sequence[Tensor], starts: Tensor, cu_seqlens: Tensor, size: int, fill: float | Sequence[float] = 0
) -> list[Tensor]:
    """The inverse of `pack`: values [size], with sequence i from `starts[i]` on.

    Positions that no sequence holds are `fill`, one for all streams or one for each. Sequences must not overlap.
    Carries no gradient.
    """
    return _ops.unpack(
        streams, starts, cu_seqlens, size, [fill] * len(streams) if isinstance(fill, int | float) else fill
    )


def token_layout(tokens: Tensor, prompt_lengths: Tensor, cu_seqlens: Tensor) -> TokenLayout:
    """What follows of packed `tokens`, int64 [N]: sequence i begins with a prompt of `prompt_lengths[i]`, int64 [S]."""
    return TokenLayout(*_ops.token_layout(tokens, prompt_lengths, cu_seqlens))


def segment_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """[S]: the sum of mask * value over each sequence. Differentiable in `values` [N], float32 or float64."""
    return _ops.segment_reduce(values, mask, cu_seqlens, "sum")[0]


def segment_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """[S]: the sum over each sequence by max(sum of mask, 1); 0 where nothing counts. Differentiable in `values`."""
    return _ops.segment_reduce(values, mask, cu_seqlens, "mean")[0]


def segment_max(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """[S]: the greatest value whose mask is not 0, NaN if one is; -inf where nothing counts. Has no gradient."""
    return _ops.segment_reduce(values.detach(), mask, cu_seqlens, "max")[0]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    *,
    gamma: float,
    lambda_critic: Tensor,
    lambda_policy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advantages for the policy and returns for the critic, each [N].

    Backwards over a sequence, with V' and A' of the next token that the policy chose:

        delta = r + gamma V' - V,    A = delta + gamma lambda A',    return = A + V

    `advantages` are A with `lambda_policy`, `returns` hold A with `lambda_critic`, both [S]. A token with mask 0, an
    observation, lets V' and A' pass: its own reward and value count for nothing, its A is A'. Behind a sequence's last
    token V' is `bootstrap` [S], the value where a truncated sequence would go on, or 0, and A' is 0. All tensors are
    float32 or all float64; sums are of float64. Carries no gradient.

    arXiv:1506.02438; a lambda for each of the two, that of the policy 1 - 1 / (alpha * length): VAPO, arXiv:2504.05118.
    """
    return _ops.gae(rewards, values, mask, cu_seqlens, bootstrap, gamma, lambda_critic, lambda_policy)


@torch.library.register_fake("leeway::pack")
def _(streams: list[Tensor], starts: Tensor, cu_seqlens: Tensor, num_tokens: int) -> list[Tensor]:
    return [stream.new_empty(num_tokens) for stream in streams]


@torch.library.register_fake("leeway::unpack")
def _(streams: list[Tensor], starts: Tensor, cu_seqlens: Tensor, size: int, fill: list[float]) -> list[Tensor]:
    return [stream.new_empty(size) for stream in streams]


@torch.library.register_fake("leeway::token_layout")
def _(tokens: Tensor, prompt_lengths: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    mask = torch.empty_like(tokens, dtype=torch.float32)
    return torch.empty_like(tokens), torch.empty_like(tokens), mask, torch.empty_like(tokens)


@torch.library.register_fake("leeway::segment_reduce")
def _(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    size = cu_seqlens.shape[0] - 1
    return values.new_empty(size), values.new_empty(size)


@torch.library.register_fake("leeway::segment_spread")
def _(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    return values.new_empty(num_tokens)


@torch.library.register_fake("leeway::gae")
def _(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


def _keep_reduction(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, mask, cu_seqlens, ctx.reduction = inputs
    ctx.num_tokens = values.shape[0]
    ctx.save_for_backward(mask, cu_seqlens, output[1])


def _reduction_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    mask, cu_seqlens, count = ctx.saved_tensors
    if ctx.reduction == "max":
        raise RuntimeError("segment_reduce: 'max' has no gradient")
    share = grad / count.clamp(min=1) if ctx.reduction == "mean" else grad
    return _ops.segment_spread(share.contiguous(), mask, cu_seqlens, ctx.num_tokens), None, None, None


def _keep_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, cu_seqlens, _ = inputs
    ctx.save_for_backward(mask, cu_seqlens)


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask, cu_seqlens = ctx.saved_tensors
    return _ops.segment_reduce(grad.contiguous(), mask, cu_seqlens, "sum")[0], None, None, None


torch.library.register_autograd("leeway::segment_reduce", _reduction_backward, setup_context=_keep_reduction)
torch.library.register_autograd("leeway::segment_spread", _spread_backward, setup_context=_keep_spread)

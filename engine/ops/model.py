"""Parts of a transformer's layer as one operation each: on the CPU, in float32 and float64.

    norm        w x / sqrt(mean(x^2) + eps) over the last dimension, and the rotation of its halves by position
    swiglu      silu(gate) up
    attention   softmax(scale q k^T) v over packed segments with shared prefixes
    decode      the same for one new token of each sequence over a cache

All are differentiable but `decode`, and give the same bits on any number of threads. They raise `ValueError` naming the
argument that is wrong.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.ops import library  # noqa: F401  (registers the operators)

_ops = torch.ops.leeway

Gradients = tuple[Tensor | None, ...]


def norm(
    x: Tensor, weight: Tensor | None, eps: float = 0.0, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """[T, H, D]: rotate(weight x / sqrt(mean(x^2) + eps)); without `weight` only rotated, without `cos` not rotated.

    x [T, H, D], weight [D], cos and sin [T, D]. With the halves (a, b) of a row, rotate(a, b) = (a cos - b sin,
    b cos + a sin) (arXiv:2104.09864); the norm is that of arXiv:1910.07467.
    """
    return _ops.norm(x, weight, cos, sin, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, all [N, F], with silu(g) = g / (1 + exp(-g)) (arXiv:2002.05202)."""
    return _ops.swiglu(gate, up)


class Families(NamedTuple):
    """Segments of T rows, segment s rows cu_seqlens[s] to cu_seqlens[s + 1], and which of them share a prefix.

    A family is a segment and those that have it as their prefix: members[bounds[f]:bounds[f + 1]], that segment first.
    """

    cu_seqlens: Tensor  # int64 [S + 1], from 0 to T
    members: Tensor  # int64 [S]
    bounds: Tensor  # int64 [families + 1], from 0 to S


def attention(query: Tensor, key: Tensor, value: Tensor, families: Families, scale: float) -> Tensor:
    """softmax(scale q k^T) v, [T, H, D]: each token over its own segment up to itself and all of its prefix.

    query [T, H, D], key and value [T, H_kv, D].
    """
    return _ops.attention(query, key, value, *families, scale)[0]


def decode(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """softmax(scale q k^T) v, [N, H, D], of one new token a slot over its cache, which keeps the token's key and value.

    query [N, H, D], key and value [N, H_kv, D]; keys and values [slots, H_kv, context, D], slots 0 to N - 1 of which
    are the tokens'; lengths int64 [N], what each keeps already.
    """
    return _ops.decode(query, key, value, keys, values, lengths, scale)


# ---- Shapes, for tracing -----------------------------------------------------------------------------------------


@torch.library.register_fake("leeway::norm")
def _(x: Tensor, weight: Any, cos: Any, sin: Any, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("leeway::norm_backward")
def _(grad: Tensor, x: Tensor, weight: Any, cos: Any, sin: Any, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1])


@torch.library.register_fake("leeway::swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("leeway::swiglu_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@torch.library.register_fake("leeway::attention")
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2])


@torch.library.register_fake("leeway::attention_backward")
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@torch.library.register_fake("leeway::decode")
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


# ---- Gradients ---------------------------------------------------------------------------------------------------


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_backward(ctx: Any, grad: Tensor) -> Gradients:
    dx, dweight = _ops.norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None, None


def _keep_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> Gradients:
    return _ops.swiglu_backward(grad, *ctx.saved_tensors)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *layout, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, *layout)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> Gradients:
    grads = _ops.attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None


torch.library.register_autograd("leeway::norm", _norm_backward, setup_context=_keep_norm)
torch.library.register_autograd("leeway::swiglu", _swiglu_backward, setup_context=_keep_swiglu)
torch.library.register_autograd("leeway::attention", _attention_backward, setup_context=_keep_attention)

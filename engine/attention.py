"""Attention over packed sequences on one flat axis, without padding and never with a T x T mask.

The flat axis is cut into segments. A token attends to the tokens of its own segment up to itself and, where the
segment names a prefix (a prompt that several completions share), to all tokens of that segment as well. A `Layout`
describes one such cut; it is made once per micro-batch and used by every layer.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.ops import model as ops


class Varlen(NamedTuple):
    """A layout as torch's attention over sequences of queries and of keys reads it, on their device."""

    rows: Tensor | None  # int64, the rows of all segments' keys, one segment behind the other; None: all, in order
    cu_queries: Tensor  # int32 [S + 1]
    cu_keys: Tensor  # int32 [S + 1]
    longest_queries: int
    longest_keys: int


class Layout:
    """How one flat axis of T tokens is cut: segment s is rows cu_seqlens[s] to cu_seqlens[s + 1].

    cu_seqlens int [S + 1], from 0 to T; prefix int [S], the segment that s attends to besides itself, -1 for none.
    A prefix may not have a prefix itself.
    """

    def __init__(self, cu_seqlens: np.ndarray, prefix: np.ndarray | None = None):
        self.cu_seqlens = np.asarray(cu_seqlens, dtype=np.int64)
        lengths = np.diff(self.cu_seqlens)
        self.prefix = np.full(len(lengths), -1) if prefix is None else np.asarray(prefix, dtype=np.int64)
        self.num_tokens = int(self.cu_seqlens[-1])
        shared = self.prefix >= 0
        assert not shared[self.prefix[shared]].any(), "a prefix has a prefix"
        own_prefix = np.where(shared, lengths[self.prefix], 0) if len(lengths) else lengths
        self.longest = int((lengths + own_prefix).max(initial=0))
        self._families = ops.Families(*map(torch.from_numpy, (self.cu_seqlens, *families(self.prefix))))
        self._varlen: Varlen | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]."""
        del layer  # a layout of training keeps no state by layer
        if query.device.type == "cpu":
            wide = torch.promote_types(query.dtype, torch.float32)
            q, k, v = (x.to(wide) for x in (query, key, value))
            return ops.attention(q, k, v, self._families, scale).to(query.dtype)
        if query.dtype in (torch.bfloat16, torch.float16):
            return attend_cuda(query, key, value, self, scale)
        return attend_plain(query, key, value, self, scale)

    def attend_plain(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `attend`, in plain torch."""
        del layer
        return attend_plain(query, key, value, self, scale)

    def key_rows(self, segment: int) -> np.ndarray:
        """The rows that the last token of `segment` attends to, in order of position."""
        parent, own = self.prefix[segment], np.arange(*self.cu_seqlens[segment : segment + 2])
        return own if parent < 0 else np.concatenate([self.key_rows(parent), own])

    def varlen(self, device: torch.device) -> Varlen:
        """Made at the first call, for whose `device` it is: each copy to a GPU makes the host wait for all that was
        asked of it before, and every layer wants them."""
        if self._varlen is None:
            keys = [self.key_rows(segment) for segment in range(len(self.prefix))]
            cu_keys = np.cumsum([0, *map(len, keys)])
            self._varlen = Varlen(
                rows=torch.from_numpy(np.concatenate(keys)).to(device) if (self.prefix >= 0).any() else None,
                cu_queries=torch.from_numpy(self.cu_seqlens).to(device, torch.int32),
                cu_keys=torch.from_numpy(cu_keys).to(device, torch.int32),
                longest_queries=int(np.diff(self.cu_seqlens).max(initial=0)),
                longest_keys=self.longest,
            )
        return self._varlen


def families(prefix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The segments [S], each prefix before those that share it, and the bounds [families + 1] of these families."""
    root = np.where(prefix < 0, np.arange(len(prefix)), prefix)
    members = np.lexsort((prefix >= 0, root))
    return members, np.flatnonzero(np.diff(root[members], prepend=-1, append=-1))


def attend_plain(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """The reference, one segment after the other: softmax(scale * q k^T + causal) v in the input's precision.

    Shapes as `Layout.attend`. Also the way of CUDA for float32, which the flash kernels refuse.
    """
    repeat = query.shape[1] // key.shape[1]
    out = [query.new_empty(0, *query.shape[1:])]
    for segment in range(len(layout.prefix)):
        rows = torch.from_numpy(layout.key_rows(segment)).to(query.device)
        first, last = layout.cu_seqlens[segment], layout.cu_seqlens[segment + 1]
        k = key[rows].repeat_interleave(repeat, 1)
        v = value[rows].repeat_interleave(repeat, 1)
        scores = scale * torch.einsum("qhd,khd->hqk", query[first:last], k)
        future = torch.ones_like(scores, dtype=torch.bool).triu(len(rows) - int(last - first) + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


def attend_cuda(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """torch's varlen attention over keys in which each segment's prefix is copied before it. Untested on a GPU.

    Shapes as `Layout.attend`. The kernel aligns the causal mask to the last key, which is the layout's rule.
    """
    from torch.nn.attention.varlen import varlen_attn

    made = layout.varlen(query.device)
    if made.rows is not None:
        key, value = key[made.rows], value[made.rows]
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}):  # torch 2.11 takes grouped queries without being told
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    out = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        made.cu_queries,
        made.cu_keys,
        made.longest_queries,
        made.longest_keys,
        **options,
    )
    assert isinstance(out, Tensor)  # a tuple only where more was asked for
    return out

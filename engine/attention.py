"""Attention over packed sequences on one flat axis: no padding outside this file and never a T x T mask.

The flat axis is cut into segments. A token attends to the tokens of its own segment up to itself and, where the
segment names a prefix (a prompt that several completions share), to all tokens of that segment as well. A `Layout`
describes one such cut; it is made once per micro-batch and used by every layer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

STRETCH = 1.25  # segments of one bucket differ in length by at most this factor, so padding stays below a quarter

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to one block of shape [num, length]; rows `start` and on of `Layout.pad`."""

    start: int
    num: int
    length: int

    def cut(self, rows: Tensor, num_heads: int) -> Tensor:
        """[P, heads * D] -> [num, heads, length, D], a view."""
        block = rows[self.start : self.start + self.num * self.length]
        return block.view(self.num, self.length, num_heads, -1).transpose(1, 2)


@dataclass(frozen=True)
class Fork:
    """Neighbouring segments that share a prefix: rows `queries` attend to all of rows `keys`."""

    queries: slice
    keys: slice


class Layout:
    """How one flat axis of T tokens is cut: segment s is rows cu_seqlens[s] to cu_seqlens[s + 1].

    cu_seqlens int [S + 1], from 0 to T; prefix int [S], the segment that s attends to besides itself, -1 for none.
    A prefix may not have a prefix itself.
    """

    def __init__(self, cu_seqlens: np.ndarray, prefix: np.ndarray | None = None, device: str | torch.device = "cpu"):
        self.cu_seqlens = np.asarray(cu_seqlens, dtype=np.int64)
        lengths = np.diff(self.cu_seqlens)
        self.prefix = np.full(len(lengths), -1) if prefix is None else np.asarray(prefix, dtype=np.int64)
        self.device = torch.device(device)
        self.num_tokens = int(self.cu_seqlens[-1])
        shared = self.prefix >= 0
        assert not shared[self.prefix[shared]].any(), "a prefix has a prefix"
        own_prefix = np.where(shared, lengths[self.prefix], 0) if len(lengths) else lengths
        self.longest = int((lengths + own_prefix).max(initial=0))
        self.forks = self._find_forks()
        self.pads = self._fill_buckets(lengths)

    def _find_forks(self) -> list[Fork]:
        cu, forks = self.cu_seqlens, []
        edges = np.flatnonzero(np.diff(self.prefix, prepend=-2, append=-2))
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            parent = self.prefix[first]
            if parent >= 0 and cu[last] > cu[first] and cu[parent + 1] > cu[parent]:
                forks.append(Fork(slice(int(cu[first]), int(cu[last])), slice(int(cu[parent]), int(cu[parent + 1]))))
        return forks

    def _fill_buckets(self, lengths: np.ndarray) -> Tensor:
        """Sets `buckets`, `pad` int64 [P] (the row that each place of the blocks holds) and `unpad` int64 [T] (the
        place of each row); returns bool [P], the places that hold nothing."""
        order = [int(s) for s in np.argsort(-lengths, kind="stable") if lengths[s]]
        self.buckets: list[Bucket] = []
        pad, empty = [np.empty(0, np.int64)], [np.empty(0, bool)]
        start = 0
        while order:
            width = int(lengths[order[0]])
            num = sum(1 for s in order if lengths[s] * STRETCH >= width)
            members, order = np.array(order[:num]), order[num:]
            place = np.arange(width)
            hollow = place >= lengths[members, None]
            pad.append(np.where(hollow, 0, self.cu_seqlens[members, None] + place).ravel())
            empty.append(hollow.ravel())
            self.buckets.append(Bucket(start, num, width))
            start += num * width
        rows, hollow = np.concatenate(pad), np.concatenate(empty)
        unpad = np.empty(self.num_tokens, np.int64)
        unpad[rows[~hollow]] = np.flatnonzero(~hollow)
        self.pad = torch.from_numpy(rows).to(self.device)
        self.unpad = torch.from_numpy(unpad).to(self.device)
        return torch.from_numpy(hollow).to(self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [H, T, D], key and value [H_kv, T, D] -> [T, H, D]."""
        del layer  # a layout of training keeps no state by layer
        if query.device.type == "cpu":
            return _SharedPrefix.apply(query, key, value, self, scale)  # type: ignore[return-value]
        if query.dtype in (torch.bfloat16, torch.float16):
            return attend_cuda(query, key, value, self, scale)
        return attend_plain(query, key, value, self, scale)

    def key_rows(self, segment: int) -> np.ndarray:
        """The rows that the last token of `segment` attends to, in order of position."""
        cu, parent = self.cu_seqlens, self.prefix[segment]
        own = np.arange(cu[segment], cu[segment + 1])
        return own if parent < 0 else np.concatenate([np.arange(cu[parent], cu[parent + 1]), own])


def attend_plain(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """The reference, one segment after the other: softmax(scale * q k^T + causal) v in the input's precision.

    Shapes as `Layout.attend`. Also the way of CUDA for float32, which the flash kernels refuse.
    """
    repeat = query.shape[0] // key.shape[0]
    out = [query.new_empty(0, query.shape[0], query.shape[2])]
    for segment in range(len(layout.prefix)):
        rows = torch.from_numpy(layout.key_rows(segment)).to(query.device)
        first, last = layout.cu_seqlens[segment], layout.cu_seqlens[segment + 1]
        k = key[:, rows].repeat_interleave(repeat, 0)
        v = value[:, rows].repeat_interleave(repeat, 0)
        scores = scale * query[:, first:last] @ k.transpose(1, 2)
        future = torch.ones_like(scores, dtype=torch.bool).triu(len(rows) - int(last - first) + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out)


def attend_cuda(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """torch's varlen attention over keys in which each segment's prefix is copied before it. Untested on a GPU.

    Shapes as `Layout.attend`. The kernel aligns the causal mask to the last key, which is the layout's rule.
    """
    from torch.nn.attention.varlen import varlen_attn

    segments = [layout.key_rows(segment) for segment in range(len(layout.prefix))]
    rows = torch.from_numpy(np.concatenate(segments)).to(query.device)
    cu_keys = np.concatenate([[0], np.cumsum([len(segment) for segment in segments])]).astype(np.int32)
    longest_query = int(np.diff(layout.cu_seqlens).max(initial=0))
    return varlen_attn(
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1)[rows],
        value.transpose(0, 1)[rows],
        torch.from_numpy(layout.cu_seqlens.astype(np.int32)).to(query.device),
        torch.from_numpy(cu_keys).to(query.device),
        longest_query,
        layout.longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[0] != key.shape[0],
    )


class _SharedPrefix(torch.autograd.Function):
    """Attention over own segment and prefix, each with the flash kernel, joined by their log-sum-exps.

    With own part (o1, l1) and prefix part (o2, l2), l the logarithm of the sum of exponentiated scores:
    w = sigmoid(l1 - l2), out = w o1 + (1 - w) o2, l = log(exp l1 + exp l2). The kernel's backward needs only out and
    l of the whole row, so each part's gradient follows from the joined values (arXiv:2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        heads, kv_heads = query.shape[0], key.shape[0]
        q, k, v = _rows(query), _rows(key), _rows(value)
        q_pad, k_pad, v_pad = (
            q.index_select(0, layout.pad),
            _repeat(k.index_select(0, layout.pad), heads, kv_heads),
            _repeat(v.index_select(0, layout.pad), heads, kv_heads),
        )
        outs, lses = [q.new_empty(0, q.shape[1])], [q.new_empty(0, heads, dtype=_lse_dtype(q))]
        for bucket in layout.buckets:
            o, lse = _flash(*(bucket.cut(x, heads) for x in (q_pad, k_pad, v_pad)), 0.0, True, scale=scale)
            outs.append(_flat(o))
            lses.append(lse.transpose(1, 2).reshape(-1, heads))
        out, lse = (torch.cat(x).index_select(0, layout.unpad) for x in (outs, lses))
        for fork in layout.forks:
            q2, k2, v2 = _fork_views(fork, q, k, v, heads, kv_heads)
            o2, l2 = _flash(q2, k2, v2, 0.0, False, scale=scale)
            o1 = _by_kv_head(out[fork.queries], heads, kv_heads)
            l1 = _by_kv_head(lse[fork.queries], heads, kv_heads)[..., 0]
            o1.copy_(torch.lerp(o2, o1, torch.sigmoid(l1 - l2).to(o2.dtype).unsqueeze(-1)))
            l1.copy_(torch.logaddexp(l1, l2))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.heads = layout, scale, (heads, kv_heads)
        return out.view(len(out), heads, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout, scale, (heads, kv_heads) = ctx.layout, ctx.scale, ctx.heads
        grad = grads[0].reshape(len(out), -1)
        q_pad, k_pad, v_pad = (
            q.index_select(0, layout.pad),
            _repeat(k.index_select(0, layout.pad), heads, kv_heads),
            _repeat(v.index_select(0, layout.pad), heads, kv_heads),
        )
        # exp(score - inf) = 0: an empty place of a block gives no gradient to the keys before it
        lse_pad = lse.index_select(0, layout.pad).masked_fill_(layout.pads.unsqueeze(1), torch.inf)
        grad_pad, out_pad = grad.index_select(0, layout.pad), out.index_select(0, layout.pad)
        parts: list[tuple[Tensor, ...]] = [(q[:0], q[:0], q[:0])]
        for bucket in layout.buckets:
            blocks = [bucket.cut(x, heads) for x in (grad_pad, q_pad, k_pad, v_pad, out_pad, lse_pad)]
            part = _flash_backward(*blocks[:5], blocks[5][..., 0], 0.0, True, scale=scale)
            parts.append(tuple(_flat(x) for x in part))
        dq, dk, dv = (torch.cat(x).index_select(0, layout.unpad) for x in zip(*parts, strict=True))
        dk, dv = (x.view(len(x), kv_heads, heads // kv_heads, -1).sum(2).flatten(1) for x in (dk, dv))
        for fork in layout.forks:
            q2, k2, v2 = _fork_views(fork, q, k, v, heads, kv_heads)
            g2, o2 = (_by_kv_head(x[fork.queries], heads, kv_heads) for x in (grad, out))
            l2 = _by_kv_head(lse[fork.queries], heads, kv_heads)[..., 0]
            dq2, dk2, dv2 = _flash_backward(g2, q2, k2, v2, o2, l2, 0.0, False, scale=scale)
            _by_kv_head(dq[fork.queries], heads, kv_heads).add_(dq2)
            dk[fork.keys].add_(_flat(dk2.sum(1, keepdim=True).transpose(0, 1)))
            dv[fork.keys].add_(_flat(dv2.sum(1, keepdim=True).transpose(0, 1)))
        dim = dq.shape[1] // heads
        return *(x.view(len(x), -1, dim).transpose(0, 1) for x in (dq, dk, dv)), None, None


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """[heads, T, D] -> [T, heads * D]; a view where memory lies so already."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def _flat(x: Tensor) -> Tensor:
    """[N, heads, L, D] -> [N * L, heads * D]."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1)


def _repeat(rows: Tensor, heads: int, kv_heads: int) -> Tensor:
    """[P, kv_heads * D] -> [P, heads * D], each head as often as query heads share it."""
    if heads == kv_heads:
        return rows
    return rows.view(len(rows), kv_heads, 1, -1).expand(-1, -1, heads // kv_heads, -1).reshape(len(rows), -1)


def _by_kv_head(rows: Tensor, heads: int, kv_heads: int) -> Tensor:
    """[N, heads * D] -> [kv_heads, heads / kv_heads, N, D], a view."""
    return rows.view(len(rows), kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)


def _fork_views(
    fork: Fork, q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views [kv_heads, heads / kv_heads, N, D] of the fork's queries and, repeated without a copy, of its keys."""
    repeat = heads // kv_heads
    k2, v2 = (_by_kv_head(x[fork.keys], kv_heads, kv_heads).expand(-1, repeat, -1, -1) for x in (k, v))
    return _by_kv_head(q[fork.queries], heads, kv_heads), k2, v2

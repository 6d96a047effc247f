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
        parent, rows = self.prefix[segment], np.arange(self.num_tokens)
        own = rows[self.cu_seqlens[segment] : self.cu_seqlens[segment + 1]]
        return own if parent < 0 else np.concatenate([self.key_rows(parent), own])


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
    out = varlen_attn(
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
    assert isinstance(out, Tensor)  # a tuple only where more was asked for
    return out


class _SharedPrefix(torch.autograd.Function):
    """Attention over own segment and prefix, each with the flash kernel, joined by their log-sum-exps.

    With own part (o1, l1) and prefix part (o2, l2), l the logarithm of the sum of exponentiated scores:
    w = sigmoid(l1 - l2), out = w o1 + (1 - w) o2, l = log(exp l1 + exp l2). The kernel's backward needs only out and
    l of the whole row, so each part's gradient follows from the joined values (arXiv:2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        kv_heads, repeat = key.shape[0], query.shape[0] // key.shape[0]
        q, k, v = _rows(query), _rows(key), _rows(value)
        blocks = [x.index_select(0, layout.pad) for x in (q, k, v)]
        blocks[1:] = (_repeat(x, kv_heads, repeat) for x in blocks[1:])
        out, lse = _own(layout, blocks, kv_heads * repeat, scale)
        q_all, o_all, l_all = (_by_head(x, kv_heads, repeat) for x in (q, out, lse))
        k_all, v_all = (_by_head(x, kv_heads, 1).expand(-1, repeat, -1, -1) for x in (k, v))
        for fork in layout.forks:
            at, of = fork.queries, fork.keys
            o2, l2 = _flash(q_all[:, :, at], k_all[:, :, of], v_all[:, :, of], 0.0, False, scale=scale)
            o1, l1 = o_all[:, :, at], l_all[:, :, at, 0]
            o1.copy_(torch.lerp(o2, o1, torch.sigmoid(l1 - l2).to(o2.dtype).unsqueeze(-1)))
            l1.copy_(torch.logaddexp(l1, l2))
        ctx.save_for_backward(q, k, v, *blocks, out, lse)
        ctx.layout, ctx.scale, ctx.heads = layout, scale, (kv_heads, repeat)
        return out.view(len(out), kv_heads * repeat, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *blocks, out, lse = ctx.saved_tensors
        layout, scale, (kv_heads, repeat) = ctx.layout, ctx.scale, ctx.heads
        grad = grads[0].reshape(out.shape)
        dq, dk, dv = _own_backward(layout, [grad, *blocks, out, lse], scale)
        dk, dv = (x.view(len(x), kv_heads, repeat, -1).sum(2).flatten(1) for x in (dk, dv))
        g_all, q_all, o_all, l_all, dq_all = (_by_head(x, kv_heads, repeat) for x in (grad, q, out, lse, dq))
        k_all, v_all = (_by_head(x, kv_heads, 1).expand(-1, repeat, -1, -1) for x in (k, v))
        dk_all, dv_all = (_by_head(x, kv_heads, 1)[:, 0] for x in (dk, dv))
        for fork in layout.forks:
            at, of = fork.queries, fork.keys
            inputs = g_all[:, :, at], q_all[:, :, at], k_all[:, :, of], v_all[:, :, of], o_all[:, :, at]
            dq2, dk2, dv2 = _flash_backward(*inputs, l_all[:, :, at, 0], 0.0, False, scale=scale)
            dq_all[:, :, at] += dq2
            dk_all[:, of] += dk2.sum(1)
            dv_all[:, of] += dv2.sum(1)
        dim = dq.shape[1] // (kv_heads * repeat)
        return *(x.view(len(x), -1, dim).transpose(0, 1) for x in (dq, dk, dv)), None, None


def _own(layout: Layout, blocks: list[Tensor], heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention within segments: `blocks` are q, k, v [P, heads * D]; returns out [T, heads * D] and the log-sum-exp
    [T, heads]."""
    parts = [(blocks[0][:0], blocks[0].new_empty(0, heads, dtype=torch.promote_types(blocks[0].dtype, torch.float32)))]
    for bucket in layout.buckets:
        out, lse = _flash(*(bucket.cut(x, heads) for x in blocks), 0.0, True, scale=scale)
        parts.append((_flat(out), _flat(lse.unsqueeze(-1))))
    out, lse = (torch.cat(part).index_select(0, layout.unpad) for part in zip(*parts, strict=True))
    return out, lse


def _own_backward(layout: Layout, saved: list[Tensor], scale: float) -> list[Tensor]:
    """Gradients [T, heads * D] of q, k and v as `_own` takes them; `saved` are the output's gradient [T, heads * D],
    the three blocks, the joined output and its log-sum-exp."""
    heads = saved[-1].shape[1]
    grad, out, lse = (x.index_select(0, layout.pad) for x in (saved[0], saved[-2], saved[-1]))
    # exp(score - inf) = 0: an empty place of a block gives no gradient to the keys before it
    lse.masked_fill_(layout.pads.unsqueeze(1), torch.inf)
    parts = [[x[:0] for x in saved[1:4]]]
    for bucket in layout.buckets:
        *inputs, kept = (bucket.cut(x, heads) for x in (grad, *saved[1:4], out, lse))
        parts.append([_flat(x) for x in _flash_backward(*inputs, kept[..., 0], 0.0, True, scale=scale)])
    return [torch.cat(part).index_select(0, layout.unpad) for part in zip(*parts, strict=True)]


def _rows(x: Tensor) -> Tensor:
    """[heads, T, D] -> [T, heads * D]; a view where memory lies so already."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])


def _flat(x: Tensor) -> Tensor:
    """[N, heads, L, D] -> [N * L, heads * D]."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1] * x.shape[3])


def _repeat(rows: Tensor, kv_heads: int, repeat: int) -> Tensor:
    """[P, kv_heads * D] -> [P, kv_heads * repeat * D], each head as often as query heads share it."""
    dim = rows.shape[1] // kv_heads
    return rows.view(-1, kv_heads, 1, dim).expand(-1, -1, repeat, -1).reshape(-1, kv_heads * repeat * dim)


def _by_head(rows: Tensor, kv_heads: int, repeat: int) -> Tensor:
    """[N, kv_heads * repeat * D] -> [kv_heads, repeat, N, D], a view."""
    return rows.view(len(rows), kv_heads, repeat, -1).permute(1, 2, 0, 3)

"""The keys and values of the sequences that decode together, in slots of fixed size, and one step over them."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from engine.attention import Layout
from engine.ops import model as ops


class KVCache:
    """Keys and values [layers, 2, slots, kv_heads, context, D]. Empty places hold zeros or what lay there before:
    finite numbers, because a weight of 0 times anything else would be NaN."""

    def __init__(self, config: PretrainedConfig, num_slots: int, context: int, like: Tensor):
        heads = config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.context = context
        shape = (config.num_hidden_layers, 2, num_slots, self.num_kv_heads, context, self.head_dim)
        self.entries = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.rows = [[part.view(-1, self.head_dim) for part in layer] for layer in self.entries]
        self.blocks = [[part.flatten(0, 1) for part in layer] for layer in self.entries]
        self._offsets = np.arange(self.num_kv_heads) * context

    def copy(self, source: int, first: int, last: int, length: int) -> None:
        """The first `length` places of slot `source` to slots `first` up to, not including, `last`."""
        self.entries[:, :, first:last, :, :length] = self.entries[:, :, source : source + 1, :, :length]

    def places(self, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """The rows [N * kv_heads] of `rows` at which tokens at `positions` of `slots`, both int64 [N], are kept."""
        index = (slots * (self.num_kv_heads * self.context) + positions)[:, None] + self._offsets
        return torch.from_numpy(index.ravel()).to(self.entries.device)


class Step:
    """The layout of one forward: first one new token of each of slots 0 to n - 1, then whole sequences, packed.

    `lengths` int64 [n]: the tokens that each slot keeps already. `places`: where every row's keys and values go.
    """

    def __init__(self, cache: KVCache, lengths: np.ndarray, places: Tensor, packed: Layout | None):
        self.cache, self.places, self.packed = cache, places, packed
        self.num_decoding = len(lengths)
        self.longest = max(int(lengths.max(initial=-1)) + 1, packed.longest if packed else 0)
        self._lengths = torch.from_numpy(lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]; keeps the keys and values."""
        if query.device.type != "cpu" or query.dtype.itemsize < 4:
            return self.attend_plain(layer, query, key, value, scale)
        n, parts = self.num_decoding, []
        if n:
            keys, values = self.cache.entries[layer]
            parts.append(ops.decode(query[:n], key[:n], value[:n], keys, values, self._lengths, scale))
        if self.packed is not None:
            self._keep(layer, self.places[n * key.shape[1] :], key[n:], value[n:])
            parts.append(self.packed.attend(layer, query[n:], key[n:], value[n:], scale))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def attend_plain(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `attend`, in plain torch."""
        n = self.num_decoding
        self._keep(layer, self.places, key, value)
        parts = [self._decode(layer, query[:n], scale)] if n else []
        if self.packed is not None:
            parts.append(self.packed.attend_plain(layer, query[n:], key[n:], value[n:], scale))
        return torch.cat(parts)

    def _keep(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        for kept, new in zip(self.cache.rows[layer], (key, value), strict=True):
            kept.index_copy_(0, places, new.reshape(-1, new.shape[2]))

    def _decode(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """softmax(scale * q k^T + mask) v for one query a slot, the query heads of a kept head side by side."""
        num, heads, dim = query.shape
        keys, values = (block[: num * self.cache.num_kv_heads, : self._width] for block in self.cache.blocks[layer])
        q = query.reshape(num * self.cache.num_kv_heads, -1, dim)
        scores = torch.baddbmm(self._mask, q, keys.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1, dtype=torch.float32 if q.dtype.itemsize < 4 else None).to(q.dtype)
        return torch.bmm(weights, values).view(num, heads, dim)

    @cached_property
    def _width(self) -> int:
        return int(self._lengths.max()) + 1

    @cached_property
    def _mask(self) -> Tensor:
        unseen = torch.arange(self._width) > self._lengths[:, None]
        mask = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        return mask.repeat_interleave(self.cache.num_kv_heads, 0)[:, None].to(self.cache.entries)

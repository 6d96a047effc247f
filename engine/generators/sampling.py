"""Drawing tokens: one uniform number a token, keyed by what the token is and not by when or beside what it is drawn."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from engine.schema import Kind

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, kind: Kind, group_id: int, sample: int) -> np.uint64:
    """The random stream of one completion."""
    digest = hashlib.blake2b(f"{seed}/{kind}/{group_id}/{sample}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def uniform(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1): number `positions[i]` of stream `keys[i]`, both [N]; multiples of 2**-52.

    SplitMix64 (Steele, Lea, Flood 2014), whose state after n steps is key + n * GOLDEN, so no state is kept.
    """
    z = keys + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(
    logits: Tensor, numbers: Tensor, *, temperature: Tensor | None, top_p: Tensor | None, top_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token a row: the least t with sum of p[0..t] > number; and its log-probability before truncation.

    logits float32 [N, V]; numbers float64 [N], uniform in [0, 1); temperature, top_p float32 [N] and top_k int64 [N],
    None where it changes no row. Returns tokens int64 [N], log softmax(logits / temperature) at them, float32 [N].
    """
    if temperature is not None:
        logits = logits / temperature.unsqueeze(1)
    logprobs = torch.log_softmax(logits, -1)
    weights = logprobs.exp()
    if top_p is not None or top_k is not None:
        weights = _truncate(weights, top_p, top_k)
    mass = weights.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(mass, numbers.unsqueeze(1) * mass[:, -1:], right=True)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def _truncate(weights: Tensor, top_p: Tensor | None, top_k: Tensor | None) -> Tensor:
    """`weights` [N, V] with 0 outside the `top_k` likeliest (0: all) and the fewest likeliest that reach `top_p`."""
    ordered, order = torch.sort(weights, stable=True, dim=-1, descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_p is not None:
        kept &= ordered.cumsum(-1) - ordered < top_p.unsqueeze(1)
    if top_k is not None:
        limit = torch.where(top_k > 0, top_k, weights.shape[1])
        kept &= torch.arange(weights.shape[1], device=weights.device) < limit.unsqueeze(1)
    kept[:, 0] = True
    return torch.zeros_like(weights).scatter_(1, order, ordered * kept)

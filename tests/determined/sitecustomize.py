"""SGLang's deterministic mode on a CPU, for which it has no attention backend and only kernels for GPUs. With
LEEWAY_DETERMINED set torch's attention is admitted, matrix products stay as they are, whose sums hang on the batch in
the last bit, and the hash of seed, position and token is computed by numpy. What draws tokens by it is SGLang's own.
"""

import inspect
import os

import numpy as np

MASK = np.uint64(0xFFFFFFFF)


def murmur_hash32(seed, positions, col_indices):
    """uint32 [rows, columns]: MurmurHash3 (Appleby) of the blocks seed (two), position and column."""
    import torch

    seed, positions = (each.numpy().astype(np.uint64)[:, None] for each in (seed, positions))
    columns = col_indices.numpy().astype(np.uint64)[None]
    state = np.zeros((len(seed), columns.shape[1]), np.uint64)
    for block in (seed & MASK, seed >> np.uint64(32), positions, columns):
        block = rotated(block * np.uint64(0xCC9E2D51) & MASK, 15) * np.uint64(0x1B873593) & MASK
        state = rotated(state ^ block, 13) * np.uint64(5) + np.uint64(0xE6546B64) & MASK
    state ^= np.uint64(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        state = (state ^ state >> np.uint64(shift)) * np.uint64(factor) & MASK
    return torch.from_numpy(state.astype(np.int64))


def rotated(number, places):
    return (number << np.uint64(places) | number >> np.uint64(32 - places)) & MASK


if "LEEWAY_DETERMINED" in os.environ:
    from sglang.srt import batch_invariant_ops, server_args
    from sglang.srt.layers import sampler

    server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")
    server_args.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND.append("torch_native")
    batch_invariant_ops.enable_batch_invariant_mode = lambda *_: None
    sampler.murmur_hash32 = murmur_hash32
    sampler.multinomial_with_seed = inspect.unwrap(sampler.multinomial_with_seed)

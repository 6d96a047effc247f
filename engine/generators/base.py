"""What every generator offers to the actor loop, be it embedded or a server."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from engine.schema import Finish, Lease, LeaseKey

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from engine.weights import Manifest

CONFIGURATIONS = ("config.json", "generation_config.json")


class Sampled(msgspec.Struct, frozen=True):
    """A lease's completions, flat one after the other; `lengths[i]` tokens belong to sample i; T = sum(lengths).

    token_ids int32 [T], the stop token included; logprobs float32 [T], log softmax(logits / temperature) of each
    token; versions int32 [T], the weight version that computed it.
    """

    lease: Lease
    lengths: list[int]
    finish: list[Finish]
    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    kv_mixed: bool  # some tokens were computed over KV entries of an older version


class Generator(Protocol):
    version: int  # the newest applied; -1 before the first load
    manifest: "Manifest | None"  # of the versions that it can load; None: it finds out at the first load

    def submit(self, lease: Lease) -> None:
        """Queues a lease. Raises `ConfigError` for a prompt that leaves no room in the context."""
        ...

    def poll(self, timeout_s: float) -> list[Sampled]:
        """Advances and returns the leases that finished; returns at once where nothing runs."""
        ...

    def fileno(self) -> int:
        """A descriptor that becomes readable when `poll` has something to say; -1 where only `poll` advances."""
        ...

    def memory(self, num_bytes: int, device: "torch.device") -> "Tensor":
        """uint8 [num_bytes] on `device`, the host or the generator's own, in which the next version is staged while
        sampling goes on. Asked for twice: two that differ are staged in by turns, so that `load` may keep what it is
        given; else it copies."""
        ...

    def load(self, version: int, weights: Mapping[str, "Tensor"]) -> None:
        """Samples with `weights`, views of `memory`, from the next token on; running requests go on.

        All or nothing: where it raises, either the old version is whole or the generator is of no more use.
        """
        ...

    def cancel(self, key: LeaseKey) -> None:
        """Forgets a lease, waiting or running, soon: `poll` may still give what has just finished. Unknown ones are
        ignored."""
        ...

    @property
    def num_free_slots(self) -> int:
        """Sequences that could start now, beyond those queued; negative where more wait than fit."""
        ...

    @property
    def num_running(self) -> int:
        """Sequences waiting or decoding."""
        ...

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled since the start."""
        ...

    def close(self) -> None:
        """Ends what the generator started."""
        ...


def stop_ids(tokenizer: "PreTrainedTokenizerBase", files: Mapping[str, bytes]) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those that the model's configurations among `files` name,
    a number or a list of them."""
    named = (json.loads(files.get(name, b"{}")).get("eos_token_id") for name in CONFIGURATIONS)
    given = (tokenizer.eos_token_id, *named)
    return sorted({number for entry in given if entry is not None for number in np.atleast_1d(entry).tolist()})

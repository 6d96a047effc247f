"""The policy as a Hugging Face causal language model, whose attention is ours.

Our attention is registered with transformers under the name "leeway". It takes a layout from the keyword arguments
that the model hands down to its attention modules, so any model that uses the attention interface works unchanged;
transformers makes no mask for it.
"""

import json
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.config import ConfigError, Model

ATTENTION = "leeway"
UNSUPPORTED = ("softcap", "s_aux", "head_mask", "position_bias")  # variants of attention that we do not compute


class Attends(Protocol):
    """A layout: knows which rows of the flat axis see which keys."""

    longest: int  # the longest sequence, in tokens, that any row belongs to

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [H, T, D], key and value [H_kv, T, D] -> [T, H, D]."""
        ...


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    Dropout is left out: the learner must compute the function that sampled. Raises `ConfigError` for a model that
    hands no layout down, or whose attention is of a kind that we do not compute.
    """
    layout: Attends | None = kwargs.get("layout")
    if layout is None:
        raise ConfigError(f"model: {type(module).__name__} hands no keyword arguments down to its attention")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(f"model: attention with {name}, as in {type(module).__name__}, is not supported")
    window = kwargs.get("sliding_window")
    if window is not None and layout.longest > window:
        raise ConfigError(f"model: a sliding window of {window} is shorter than a sequence of {layout.longest} tokens")
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = layout.attend(module.layer_idx, query[0], key[0], value[0], scale)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, attention)


def build(model: Model, *, vocab_size: int, eos_id: int, pad_id: int, seed: int) -> PreTrainedModel:
    """The model that `[model]` describes: read from `path`, or new from `init` with weights drawn from `seed`.

    Raises `ConfigError` for a model that cannot be read or built, has too few token ids or too short a context.
    """
    dtype = getattr(torch, model.dtype)
    options = {"attn_implementation": ATTENTION, "dtype": dtype, "trust_remote_code": model.trust_remote_code}
    try:
        if model.path:
            policy = AutoModelForCausalLM.from_pretrained(model.path, **options)
        else:
            ids = {"vocab_size": vocab_size, "eos_token_id": eos_id, "pad_token_id": pad_id, "bos_token_id": None}
            config = AutoConfig.for_model(**{"max_position_embeddings": model.context, **ids, **model.init})
            policy = _new(config, dtype, seed)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        field, value = ("model.path", repr(model.path)) if model.path else ("model.init", str(dict(model.init)))
        raise ConfigError(f"{field} = {value}: {' '.join(str(error).split())}") from error
    _check_sizes(policy, model, vocab_size)
    return policy


def _new(config: Any, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)


def _check_sizes(policy: PreTrainedModel, model: Model, vocab_size: int) -> None:
    num_ids = policy.get_input_embeddings().weight.shape[0]
    if num_ids < vocab_size:
        raise ConfigError(f"model: {num_ids} token ids, fewer than the tokenizer's {vocab_size}")
    longest = getattr(policy.config, "max_position_embeddings", None)
    if longest is not None and model.context > longest:
        raise ConfigError(f"model.context = {model.context}: must be at most the model's {longest} positions")
    window = getattr(policy.config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(policy.config, "layer_types", None) or ["sliding_attention"])
    if window is not None and sliding and model.context > window:
        raise ConfigError(f"model.context = {model.context}: must be at most the model's sliding window, {window}")


def describe(model: PreTrainedModel) -> dict[str, bytes]:
    """The small files from which `from_description` rebuilds the model without its weights, by file name."""
    return {"config.json": json.dumps(model.config.to_dict(), default=str).encode()}


def from_description(files: dict[str, bytes], dtype: str, device: str | torch.device) -> PreTrainedModel:
    """The model that `describe` described, for inference; its weights are arbitrary until they are loaded."""
    config = AutoConfig.for_model(**json.loads(files["config.json"]))
    with torch.device(device):
        model = _new(config, getattr(torch, dtype), seed=0)
    return model.eval().requires_grad_(False)


def hidden_states(model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor, layout: Attends) -> Tensor:
    """The last hidden states [T, hidden] of one flat forward, before the head; token_ids, position_ids int64 [T]."""
    outputs = model.base_model(
        input_ids=token_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, layout=layout
    )
    return outputs.last_hidden_state[0]


def lm_head(model: PreTrainedModel) -> nn.Module:
    """The module that turns hidden states into logits."""
    return model.get_output_embeddings()

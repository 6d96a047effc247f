"""The policy as a Hugging Face causal language model, whose attention is ours.

Our attention is registered with transformers under the name "leeway". It takes a layout from the keyword arguments
that the model hands down to its attention modules, so any model that uses the attention interface works unchanged;
transformers makes no mask for it. Under the name "leeway_plain" it is the same in plain torch.
"""

import inspect
import json
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from engine.attention import Layout
from engine.config import ConfigError, Model

ATTENTION, PLAIN_ATTENTION = "leeway", "leeway_plain"
HEAD_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # what some models do after the head
UNSUPPORTED = ("softcap", "s_aux", "head_mask", "position_bias")  # variants of attention that we do not compute


class Attends(Protocol):
    """A layout: knows which rows of the flat axis see which keys."""

    longest: int  # the longest sequence, in tokens, that any row belongs to

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]."""
        ...

    def attend_plain(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `attend`, in plain torch."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plain: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    Dropout is left out, as in `build`. Raises `ConfigError` for a model that hands no layout down, or whose attention
    is of a kind that we do not compute.
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
    attend = layout.attend_plain if plain else layout.attend
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(module.layer_idx, *rows, scale).unsqueeze(0), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION, attention)
AttentionInterface.register(PLAIN_ATTENTION, partial(attention, plain=True))


def build(
    model: Model, *, vocab_size: int, eos_id: int, pad_id: int, seed: int, empty: bool = False
) -> PreTrainedModel:
    """The model that `[model]` describes: read from `path`, or new from `init` with weights drawn from `seed`; where
    it is `empty`, on the meta device, for another rank's values.

    Raises `ConfigError` for a model that cannot be read or built, has too few token ids or too short a context.
    """
    dtype = getattr(torch, model.dtype)
    options = {"attn_implementation": ATTENTION, "dtype": dtype}
    try:
        if model.path:
            config = AutoConfig.from_pretrained(model.path)
        else:
            ids = {"vocab_size": vocab_size, "eos_token_id": eos_id, "pad_token_id": pad_id, "bos_token_id": None}
            config = AutoConfig.for_model(**{"max_position_embeddings": model.context, **ids, **model.init})
        _check_kind(config)
        if empty:
            policy = _empty(config, dtype)
        elif model.path:
            policy = AutoModelForCausalLM.from_pretrained(model.path, **options)
        else:
            policy = _new(config, dtype, seed)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        field, value = ("model.path", repr(model.path)) if model.path else ("model.init", str(dict(model.init)))
        raise ConfigError(f"{field} = {value}: {' '.join(str(error).split())}") from error
    _check_sizes(policy, model, vocab_size)
    _check_head(policy)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the learner must compute the function that sampled
    return policy


def _new(config: Any, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)


def _empty(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return _new(config, dtype, seed=0)


def _check_kind(config: PreTrainedConfig) -> None:
    """Left to itself transformers names every class that it knows, or takes the text out of a model of more."""
    text = config.get_text_config()
    if text is not config:
        part = f"save its language model, {text.model_type!r}, by itself"
        raise ValueError(f"{config.model_type!r} is a model of more than text; {part}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type!r} is no causal language model")


def _check_sizes(policy: PreTrainedModel, model: Model, vocab_size: int) -> None:
    num_ids = policy.config.get_text_config().vocab_size
    if num_ids < vocab_size:
        raise ConfigError(f"model: {num_ids} token ids, fewer than the tokenizer's {vocab_size}")
    longest = getattr(policy.config, "max_position_embeddings", None)
    if longest is not None and model.context > longest:
        raise ConfigError(f"model.context = {model.context}: must be at most the model's {longest} positions")
    window = getattr(policy.config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(policy.config, "layer_types", None) or ["sliding_attention"])
    if window is not None and sliding and model.context > window:
        raise ConfigError(f"model.context = {model.context}: must be at most the model's sliding window, {window}")


def _check_head(policy: PreTrainedModel) -> None:
    """Generator and learner both apply the head alone; a model that does more to its logits would be another one."""
    for name in HEAD_SCALES:
        value = getattr(policy.config.get_text_config(), name, None)
        if value not in (None, 1, 1.0):
            raise ConfigError(f"model: {name} = {value!r} changes the logits after the head, which is not supported")


def describe(model: PreTrainedModel) -> dict[str, bytes]:
    """The small files from which `from_description` rebuilds the model without its weights, by file name; of its
    generation_config.json what ends a sequence, which many a model says there alone."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    ends = {"eos_token_id": getattr(model.generation_config, "eos_token_id", None)}
    files = {"config.json": config, "generation_config.json": ends}
    return {name: json.dumps(content, default=str).encode() for name, content in files.items()}


def from_description(files: dict[str, bytes], dtype: str, device: str | torch.device) -> PreTrainedModel:
    """The model that `describe` described, for inference; its weights are arbitrary until they are loaded."""
    config = AutoConfig.for_model(**json.loads(files["config.json"]))
    with torch.device(device):
        model = _new(config, getattr(torch, dtype), seed=0)
    return model.eval().requires_grad_(False)


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    inner = model.base_model
    assert isinstance(inner, PreTrainedModel), f"{type(model).__name__} keeps its layers in a {type(inner).__name__}"
    return inner


def hidden_states(model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor, layout: Attends) -> Tensor:
    """The last hidden states [T, hidden] of one flat forward, before the head; token_ids, position_ids int64 [T].

    Without tokens it computes one and drops it: a rank with nothing to do still takes part in every collective.
    """
    if not len(token_ids):
        nothing = token_ids.new_zeros(1)
        return hidden_states(model, nothing, nothing, Layout(np.array([0, 1])))[:0]
    outputs = model.base_model(
        input_ids=token_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, layout=layout
    )
    return outputs.last_hidden_state[0]


def lm_head(model: PreTrainedModel) -> nn.Module:
    """The module that turns hidden states into logits."""
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    return head


def widen_head(model: PreTrainedModel) -> None:
    """Lets the head compute in float32, with a weight in float32, whatever the rest of the model computes in.

    An embedding tied to it shares that weight, but hands on what it did before.
    """
    head, embedding = lm_head(model), model.get_input_embeddings()
    narrow = embedding.get_parameter("weight").dtype
    head.float()
    head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].float(),))
    embedding.register_forward_hook(lambda _embedding, _inputs, output: output.to(narrow))


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Raises `ConfigError` where a sequence's hidden states change with what is packed beside it.

    Runs two short random sequences packed and the second alone, and names the first module whose output for the
    second differs: an attention of its own, a convolution or a recurrence that knows no sequence borders.
    """
    parameters = inspect.signature(model.base_model.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ConfigError(f"model: {type(model).__name__} takes no layout of packed sequences")
    first, second = 11, 12
    device = model.device
    drawn = np.random.default_rng(0).integers(model.config.get_text_config().vocab_size, size=first + second)
    token_ids = torch.from_numpy(drawn).to(device)
    positions = torch.cat([torch.arange(first), torch.arange(second)]).to(device)
    both = Layout(np.array([0, first, first + second]))
    one = Layout(np.array([0, second]))
    try:
        packed = _outputs(model, token_ids, positions, both)
        alone = _outputs(model, token_ids[first:], positions[first:], one)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model: {type(model).__name__} cannot compute packed sequences: {error}") from error
    for name, whole in packed.items():
        single = alone.get(name)
        if single is None or whole.shape[1] != first + second or single.shape[1] != second:
            continue
        bound = torch.finfo(whole.dtype).eps ** 0.5 * single.abs().max()
        if not (whole[:, first:] - single).abs().max() <= bound:
            raise ConfigError(f"model: {name} ({type(model).__name__}) lets packed sequences see each other")


def _outputs(model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor, layout: Layout) -> dict[str, Tensor]:
    """What each module returned, as far as it is [1, T, ...], by name in the order of their return."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            outputs[name] = value

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in model.base_model.named_modules()
    ]
    try:
        outputs["the last hidden state"] = hidden_states(model, token_ids, position_ids, layout).unsqueeze(0)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs

"""A Hugging Face model with parts of its layers computed by one operation each, on the CPU.

Which modules these are is asked of the modules themselves: where the class's name and the attributes are those of a
row of `PARTS`, a copy of the module with random weights computes an example both ways, and only if both agree the
module's forward is replaced. A variant that nobody has thought of stays as it is, and so do models on CUDA.
"""

import copy
import re
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.attention import Layout
from engine.model import PLAIN_ATTENTION, attention
from engine.ops import model as ops

TOLERANCE = 1e-4  # of the greatest output; transformers computes norms in float32 whatever the model's type is
LENGTHS = (3, 4)  # tokens of the example's two sequences


def use(model: PreTrainedModel, backend: str, device: torch.device) -> PreTrainedModel:
    """`model`, in place, as `ops.backend` says: parts replaced where there are faster ones on `device`, where it is
    going to compute, or all in plain torch."""
    if backend == "reference":
        model.set_attn_implementation(PLAIN_ATTENTION)
        return model
    for module in model.modules() if device.type == "cpu" else ():
        for part in PARTS:
            if part.fits(module) and has_kernels(module) and agrees(module, part):
                module.forward = MethodType(_either(part.forward), module)
    return model


def has_kernels(module: nn.Module) -> bool:
    """By its parameters' type of the present moment: mixed precision has others during a forward."""
    return next(module.parameters()).dtype in (torch.float32, torch.float64)


def _either(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` where it has kernels, else the module's own."""

    def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward if has_kernels(self) else type(self).forward)(self, *args, **kwargs)

    return chosen


# ---- The parts ---------------------------------------------------------------------------------------------------


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.reshape(-1, 1, hidden_states.shape[-1])
    return ops.norm(rows, self.weight, self.variance_epsilon).view(hidden_states.shape)


def gated_mlp(self: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return self.down_proj(ops.swiglu(self.gate_proj(rows), self.up_proj(rows))).view(x.shape)


def rotary_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    rows = hidden_states[0]
    cos, sin = (x[0] for x in position_embeddings)
    query, key, value = (
        project(rows).view(len(rows), -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    query = _rotate(query, getattr(self, "q_norm", None), cos, sin)
    key = _rotate(key, getattr(self, "k_norm", None), cos, sin)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    window = getattr(self, "sliding_window", None)
    out, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, sliding_window=window, **kwargs)
    return self.o_proj(out.reshape(hidden_states.shape[:-1] + (-1,))), None


def _rotate(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
    return ops.norm(x, weight, eps, cos, sin)


# ---- Whether a module is one -------------------------------------------------------------------------------------

Example = tuple[tuple[Any, ...], dict[str, Any]]  # arguments


class Part(NamedTuple):
    """A kind of module and what computes it."""

    name: str  # pattern of the class's name
    attributes: tuple[str, ...]
    forward: Callable[..., Any]
    example: Callable[[Any], Example]

    def fits(self, module: nn.Module) -> bool:
        return bool(re.search(self.name, type(module).__name__)) and all(hasattr(module, a) for a in self.attributes)


def _rows(width: int) -> Tensor:
    """[1, T, width], of magnitudes from some at which a norm's epsilon matters."""
    num = sum(LENGTHS)
    return torch.randn(1, num, width) * torch.logspace(-3, 1, num).unsqueeze(1)


def _of_norm(module: Any) -> Example:
    return (_rows(len(module.weight)),), {}


def _of_mlp(module: Any) -> Example:
    return (_rows(module.gate_proj.in_features),), {}


def _of_attention(module: Any) -> Example:
    angles = torch.randn(2, 1, sum(LENGTHS), module.head_dim)
    layout = Layout(np.cumsum([0, *LENGTHS]))
    return (_rows(module.q_proj.in_features), (angles[0], angles[1]), None), {"layout": layout}


PARTS = (
    Part(r"RMSNorm$", ("weight", "variance_epsilon"), rms_norm, _of_norm),
    Part(r"MLP$", ("gate_proj", "up_proj", "down_proj"), gated_mlp, _of_mlp),
    Part(
        r"Attention$", ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling"), rotary_attention, _of_attention
    ),
)


@torch.no_grad()
def agrees(module: nn.Module, part: Part) -> bool:
    """Whether `part` computes what `module` does, with random weights and on a random example."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = copy.deepcopy(module)
        if next(twin.parameters()).is_meta:
            twin.to_empty(device="cpu")
        for parameter in twin.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        arguments, options = part.example(twin)
    dtype = next(twin.parameters()).dtype
    arguments = _to(arguments, dtype)
    try:
        theirs, ours = (_first(f(*arguments, **options)) for f in (twin.forward, MethodType(part.forward, twin)))
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= TOLERANCE * theirs.abs().max())


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) else value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

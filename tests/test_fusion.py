"""Modules of transformers' models whose forward our operations take over."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from engine import fusion
from engine.attention import Layout
from engine.config import Model
from engine.model import build, hidden_states
from engine.ops import model as ops

SHAPES = {
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 4, "head_dim": 8, "attention_dropout": 0.0},
}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CPU = torch.device("cpu")
LENGTHS, PREFIX = [5, 3, 0, 70, 1, 8], [-1, 0, 0, 0, -1, 4]
BOUNDS = np.cumsum([0, *LENGTHS])


def make(shape: str, dtype: str = "float64") -> PreTrainedModel:
    spec = Model(context=128, init={**SIZE, **SHAPES[shape]}, dtype=dtype)  # pyright: ignore[reportArgumentType]
    return build(spec, vocab_size=50, eos_id=1, pad_id=0, seed=3)


def run(model: PreTrainedModel) -> list[Tensor]:
    """Hidden states and gradients of one packed forward."""
    ids = torch.from_numpy(np.random.default_rng(5).integers(2, 50, BOUNDS[-1]))
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in LENGTHS]))
    hidden = hidden_states(model, ids, positions, Layout(BOUNDS, np.array(PREFIX)))
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name and "embed_out" not in name]
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [hidden, *torch.autograd.grad(hidden, parameters, upstream.to(hidden.dtype))]


def replaced(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"}),
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}),
        ("gemma", {"GemmaAttention"}),  # its norms multiply by 1 + weight, its units are gated by gelu
        ("gpt_neox", set()),
    ],
)
def test_a_model_computes_the_same_with_its_parts_replaced(shape, parts):
    model = make(shape)
    plain = run(model)
    assert replaced(fusion.use(model, "fused", CPU)) == parts
    for ours, theirs in zip(run(model), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # transformers rounds norms to float32


def test_the_reference_is_plain_torch(monkeypatch):
    model = make("qwen3")
    fast = run(fusion.use(make("qwen3"), "fused", CPU))
    for operator in ("norm", "swiglu", "attention", "decode"):
        monkeypatch.setattr(ops, operator, None)
    for ours, theirs in zip(fast, run(fusion.use(model, "reference", CPU)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class OffsetRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


class SquareEpsilonRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon**2)
        return self.weight * hidden_states * scale


class TwiceMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_module_that_computes_something_else_stays_as_it_is():
    config = make("llama").config
    norms = [OffsetRMSNorm(8), SquareEpsilonRMSNorm(8)]
    modules = nn.ModuleList([*norms, TwiceMLP(config), LlamaRMSNorm(8), LlamaMLP(config)])
    assert replaced(fusion.use(modules, "fused", CPU)) == {"LlamaRMSNorm", "LlamaMLP"}  # pyright: ignore[reportArgumentType]


def test_numbers_of_half_precision_go_the_module_s_own_way():
    model = fusion.use(make("qwen3", "float32"), "fused", CPU)
    assert replaced(model)
    plain = make("qwen3", "float32")
    for each in (model, plain):
        nn.Module.to(each, torch.bfloat16)
    for ours, theirs in zip(run(model), run(plain), strict=True):
        assert torch.equal(ours, theirs)

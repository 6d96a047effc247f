"""The packed forward against plain transformers, one sequence at a time."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.attention import Layout, attend_cuda, attend_plain
from engine.config import ConfigError, Model
from engine.model import build, check_isolation, describe, from_description, hidden_states, lm_head

SHAPES = {
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 1},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LENGTHS = [7, 5, 9, 0, 3, 6, 4, 1, 4]
PREFIX = [-1, 0, 0, 0, 0, -1, 5, 5, -1]  # two prompts with four and two completions, and one plain sequence


def make(shape: str, dtype: Literal["float32", "float64"] = "float64", **over: object) -> PreTrainedModel:
    init = {**SMALL, **SHAPES.get(shape, {"model_type": shape}), **over}
    return build(Model(context=64, init=init, dtype=dtype), vocab_size=50, eos_id=1, pad_id=0, seed=3)


def batch() -> tuple[torch.Tensor, torch.Tensor, Layout]:
    cu = np.concatenate([[0], np.cumsum(LENGTHS)])
    token_ids = torch.from_numpy(np.random.default_rng(5).integers(2, 50, cu[-1]))
    starts = [LENGTHS[parent] if parent >= 0 else 0 for parent in PREFIX]
    positions = np.concatenate([start + np.arange(n) for start, n in zip(starts, LENGTHS, strict=True)])
    return token_ids, torch.from_numpy(positions), Layout(cu, np.array(PREFIX))


def weighted(hidden: torch.Tensor) -> torch.Tensor:
    """A scalar in which every row and column of `hidden` counts differently."""
    return (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).pow(2).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_hidden_states_and_gradients_equal_plain_transformers_one_sequence_at_a_time(shape: str) -> None:
    model = make(shape)
    token_ids, positions, layout = batch()
    packed = hidden_states(model, token_ids, positions, layout)
    weighted(packed).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation("sdpa")  # "eager" rounds its softmax to float32
    alone = []
    for segment, length in enumerate(LENGTHS):
        if length:
            rows = torch.from_numpy(layout.key_rows(segment))
            alone.append(model.base_model(input_ids=token_ids[None, rows]).last_hidden_state[0, -length:])
    expected = torch.cat(alone)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-6)  # transformers rounds norms to float32
    weighted(expected).backward()
    assert len(gradients) > 10
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)


def test_fast_attention_equals_its_reference_in_values_and_gradients() -> None:
    _, _, layout = batch()
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.num_tokens, heads, 5) for heads in (6, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    fast = layout.attend(0, inputs[0], inputs[1], inputs[2], 0.3)
    plain = attend_plain(inputs[0], inputs[1], inputs[2], layout, 0.3)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(weighted(fast), inputs), torch.autograd.grad(weighted(plain), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """torch 2.11's varlen attention, sequence by sequence: it takes grouped queries without being told of them."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max_q, max_k) == (max(queries), max(keys))
    out = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        heads = {name: x.transpose(0, 1) for name, x in {"query": q, "key": k, "value": v}.items()}
        attended = scaled_dot_product_attention(**heads, attn_mask=seen, scale=scale, enable_gqa=True)
        out.append(attended.transpose(0, 1))
    return torch.cat(out)


def varlen_told(*args, enable_gqa=False, **options):
    """That of torch 2.12, which wants to know."""
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return varlen(*args, **options)


@pytest.mark.parametrize("kernel", [varlen, varlen_told])
@pytest.mark.parametrize("prefix", [PREFIX, [-1] * len(PREFIX)])
def test_cuda_attention_tells_torchs_kernel_of_prefixes_and_grouped_heads(monkeypatch, kernel, prefix) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    layout = Layout(np.concatenate([[0], np.cumsum(LENGTHS)]), np.array(prefix))
    for heads in (6, 2):
        torch.manual_seed(0)
        q, k, v = (torch.randn(layout.num_tokens, each, 5, dtype=torch.float64) for each in (heads, 2, 2))
        ours, plain = (attend(q, k, v, layout, 0.3) for attend in (attend_cuda, attend_plain))
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_layout_goes_to_its_device_once() -> None:
    """Each copy to a GPU makes the host wait for it; a model asks once a layer."""
    _, _, layout = batch()
    first, second = (layout.varlen(torch.device("cpu")) for _ in range(2))
    assert first is second and first.rows is not None
    assert Layout(np.array([0, 3, 5])).varlen(torch.device("cpu")).rows is None  # keys without prefixes stay in place


def test_one_token_attends_to_itself_and_a_prefix_by_hand() -> None:
    # Segment 1 is one token after a prefix of one token: scores 0 and ln 3, so weights 1/4 and 3/4.
    layout = Layout(np.array([0, 1, 2]), np.array([-1, 0]))
    query, value = torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[[4.0]], [[8.0]]])
    key = torch.tensor([[[0.0]], [[float(np.log(3.0))]]])
    out = layout.attend(0, query, key, value, 1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 0.25 * 4.0 + 0.75 * 8.0]))


def test_an_empty_layout_gives_no_rows_and_no_gradient() -> None:
    model = make("qwen3")
    empty = torch.empty(0, dtype=torch.int64)
    hidden = hidden_states(model, empty, empty, Layout(np.array([0])))
    assert hidden.shape == (0, 32)
    hidden.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("shape", [*SHAPES, "gpt2"])
def test_models_of_plain_attention_pass_the_isolation_check(shape: str) -> None:
    check_isolation(make(shape, "float32"))


@pytest.mark.parametrize(
    ("init", "layer"),
    [
        ({"model_type": "mamba"}, "layers.0.mixer"),
        ({"model_type": "lfm2", "layer_types": ["full_attention", "conv"], "num_key_value_heads": 2}, "layers.1.conv"),
        ({"model_type": "bloom", "n_head": 4}, "h.0.self_attention"),
    ],
)
def test_a_model_that_leaks_is_refused_and_its_layer_named(init: dict[str, object], layer: str) -> None:
    with pytest.raises(ConfigError, match=layer):
        check_isolation(make("", "float32", **init))


def test_attention_that_we_do_not_compute_is_refused() -> None:
    with pytest.raises(ConfigError, match="softcap"):
        check_isolation(make("gemma2", "float32", num_key_value_heads=2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(context=64, path="/nowhere/at/all"), r"^model.path = '/nowhere/at/all'"),
        (Model(context=64, init={"model_type": "qwen33"}), r"^model.init = .*qwen33"),
        (
            Model(context=64, init={**SMALL, "model_type": "llama", "max_position_embeddings": 32}),
            r"^model.context = 64",
        ),
        (
            Model(context=64, init={**SMALL, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16}),
            r"^model.context = 64.*sliding window, 16",
        ),
        (Model(context=64, init={**SMALL, "model_type": "llama", "vocab_size": 40}), r"40 token ids"),
        (Model(context=64, init={"model_type": "t5"}), r"^model.init.*: 't5' is no causal language model$"),
        (
            Model(context=64, init={"model_type": "gemma3"}),
            r"'gemma3' is a model of more than text; save its language model, 'gemma3_text', by itself$",
        ),
        (Model(context=64, init={"model_type": "llava"}), r"'llava' is a model of more than text"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line_that_names_the_field(model: Model, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(model, vocab_size=50, eos_id=1, pad_id=0, seed=0)
    assert "\n" not in str(caught.value)


def test_a_description_rebuilds_the_function(tmp_path: object) -> None:
    model = make("qwen3", "float32")
    copy = from_description(describe(model), "float32", "cpu")
    copy.load_state_dict(model.state_dict())
    token_ids, positions, layout = batch()
    assert torch.equal(
        hidden_states(copy, token_ids, positions, layout), hidden_states(model, token_ids, positions, layout)
    )
    assert lm_head(copy).weight is copy.get_input_embeddings().weight


def test_the_seed_makes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = make("llama"), make("llama")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_model_on_disk_is_read_back(tmp_path: object) -> None:
    model = make("llama", "float32")
    model.save_pretrained(str(tmp_path))
    again = build(Model(context=64, path=str(tmp_path)), vocab_size=50, eos_id=1, pad_id=0, seed=0)
    assert torch.equal(lm_head(again).get_parameter("weight"), lm_head(model).get_parameter("weight"))
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path), attn_implementation="eager").eval()
    token_ids, positions, layout = batch()
    packed = hidden_states(again, token_ids, positions, layout)[:7]
    torch.testing.assert_close(packed, plain.base_model(input_ids=token_ids[None, :7]).last_hidden_state[0])

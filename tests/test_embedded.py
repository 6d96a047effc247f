"""The embedded generator against a full recomputation of what it sampled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine import tokenizer
from engine.attention import Layout
from engine.config import ConfigError, Generator, Model, Tokenizer, parse
from engine.generators.base import Sampled, stop_ids
from engine.generators.embedded import Embedded, from_files
from engine.model import build, describe, hidden_states, lm_head, widen_head
from engine.policy import manifest_of, named_tensors
from engine.schema import Lease, LeaseKey, Prompt, Sampling
from engine.weights import Manifest, WeightsError
from engine.weights.manifest import HOST

CONTEXT, EOS = 48, 1
SHAPES = {
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 1},
    "gpt_neox": {"model_type": "gpt_neox"},
}


def make_model(shape: str = "qwen3", seed: int = 0) -> PreTrainedModel:
    init = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        **SHAPES[shape],
    }
    init["initializer_range"] = 0.3  # peaked enough that weights, positions and caches matter
    model = build(Model(context=CONTEXT, init=init), vocab_size=20, eos_id=EOS, pad_id=0, seed=seed)
    return model.requires_grad_(False)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def letters(token_ids: np.ndarray) -> str:
    return "".join(chr(ord("a") + number) for number in token_ids)


def start(shape: str = "qwen3", slots: int = 6, kv: str = "recompute", stop_ids: tuple[int, ...] = (EOS,)) -> Embedded:
    config = Generator(slots=slots, max_new_tokens=16, kv=kv)  # type: ignore[arg-type]
    engine = Embedded(make_model(shape), config, context=CONTEXT, stop_ids=list(stop_ids), text=letters)
    engine.load(0, weights(make_model(shape)))
    return engine


def lease(group_id: int, num_samples: int = 3, prompt: int = 5, max_new_tokens: int = 12, **sampling: object) -> Lease:
    token_ids = np.random.default_rng(group_id).integers(2, 20, prompt).astype(np.int32)
    options = Sampling(**{"temperature": 1.0, "max_new_tokens": max_new_tokens, **sampling})  # type: ignore[arg-type]
    return Lease("train", group_id, 0, 0, 7, num_samples, Prompt("domain", group_id, token_ids, "", ""), options)


def drain(engine: Embedded) -> dict[int, Sampled]:
    finished = {}
    while engine.num_running:
        finished.update({sampled.lease.group_id: sampled for sampled in engine.poll(0.0)})
    return finished


def recomputed(model: PreTrainedModel, sampled: Sampled, sample: int) -> np.ndarray:
    """Log-probabilities of one completion by one forward over prompt and completion."""
    ends = np.cumsum(sampled.lengths)
    completion = sampled.token_ids[ends[sample] - sampled.lengths[sample] : ends[sample]]
    prompt = sampled.lease.prompt.token_ids
    token_ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    layout = Layout(np.array([0, len(token_ids)]))
    hidden = hidden_states(model, token_ids, torch.arange(len(token_ids)), layout)
    logits = lm_head(model)(hidden[len(prompt) - 1 : -1]) / sampled.lease.sampling.temperature
    return logits.log_softmax(-1).gather(1, token_ids[len(prompt) :, None])[:, 0].numpy()


def split(sampled: Sampled, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sampled.lengths)[:-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_agree_with_a_full_recomputation(shape: str) -> None:
    engine, model = start(shape), make_model(shape)
    for group_id, temperature in enumerate([1.0, 0.7, 1.3, 1.0, 1.0]):
        engine.submit(lease(group_id, num_samples=2 + group_id, prompt=3 + 2 * group_id, temperature=temperature))
    finished = drain(engine)
    assert sorted(finished) == [0, 1, 2, 3, 4]
    for group_id, sampled in finished.items():
        assert len(sampled.lengths) == 2 + group_id and sum(sampled.lengths) == len(sampled.token_ids)
        for sample, logprobs in enumerate(split(sampled, sampled.logprobs)):
            np.testing.assert_allclose(logprobs, recomputed(model, sampled, sample), atol=1e-4)
    assert engine.generated_tokens == sum(len(sampled.token_ids) for sampled in finished.values())


def test_recomputed_cache_makes_every_token_that_of_its_stamped_version() -> None:
    engine, old, new = start(kv="recompute", stop_ids=()), make_model(), make_model(seed=1)
    for group_id in range(3):  # 9 samples for 6 slots: one group half started, one waiting, at the load
        engine.submit(lease(group_id, num_samples=3 if group_id else 4, prompt=4 + group_id))
    for _ in range(5):
        engine.poll(0.0)
    engine.load(1, weights(new))
    for sampled in drain(engine).values():
        assert not sampled.kv_mixed
        for sample, (logprobs, versions) in enumerate(
            zip(split(sampled, sampled.logprobs), split(sampled, sampled.versions), strict=True)
        ):
            expected = np.where(versions == 0, recomputed(old, sampled, sample), recomputed(new, sampled, sample))
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)
            assert np.all(np.diff(versions) >= 0)
            assert versions[0] == 1 or (versions[4] == 0 and versions[5] == 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_load_takes_the_tensors_themselves(shape: str) -> None:
    engine, given = start(shape), weights(make_model(shape, seed=1))
    engine.load(1, given)
    own = engine._model.state_dict()
    assert all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in given.items())
    if shape == "qwen3":  # tied: the head follows
        assert own["lm_head.weight"].data_ptr() == given["model.embed_tokens.weight"].data_ptr()
    first, second = (engine.memory(64, HOST) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()  # so none is staged in while it is sampled with


def test_weights_of_another_model_are_refused_and_nothing_is_loaded() -> None:
    engine, old = start(), make_model()
    given = weights(make_model(seed=1))
    first, *_, last = given
    transposed = {**given, last: given[last][None]}
    for wrong, name in (
        ({**given, "extra": torch.zeros(1)}, "extra"),
        ({n: t for n, t in given.items() if n != first}, first),
        (transposed, last),
    ):
        with pytest.raises(ValueError, match=f"version 1: {name} is not in both"):
            engine.load(1, wrong)
    engine.submit(lease(0))
    sampled = drain(engine)[0]
    assert set(sampled.versions) == {0}
    for sample, logprobs in enumerate(split(sampled, sampled.logprobs)):
        np.testing.assert_allclose(logprobs, recomputed(old, sampled, sample), atol=1e-4)


def test_a_generator_knows_the_manifest_of_its_versions() -> None:
    engine = start()
    engine.manifest.require(Manifest.of(named_tensors(make_model()), torch.float32))
    with pytest.raises(WeightsError, match="tensor 0 is model.embed_tokens.weight bfloat16"):
        engine.manifest.require(Manifest.of(named_tensors(make_model()), torch.bfloat16))


def test_kept_cache_is_flagged_and_tokens_before_the_load_are_the_old_versions() -> None:
    engine, old, new = start(kv="keep", stop_ids=()), make_model(), make_model(seed=1)
    for group_id in range(3):
        engine.submit(lease(group_id, num_samples=3))
    for _ in range(5):
        engine.poll(0.0)
    engine.load(1, weights(new))
    finished = drain(engine)
    assert [finished[group_id].kv_mixed for group_id in range(3)] == [True, True, False]
    for sample, logprobs in enumerate(split(finished[0], finished[0].logprobs)):
        np.testing.assert_allclose(logprobs[:5], recomputed(old, finished[0], sample)[:5], atol=1e-4)
        assert np.abs(logprobs[6:] - recomputed(new, finished[0], sample)[6:]).max() > 1e-3  # old keys behind new
    for sample, logprobs in enumerate(split(finished[2], finished[2].logprobs)):
        np.testing.assert_allclose(logprobs, recomputed(new, finished[2], sample), atol=1e-4)


def test_a_load_while_a_prompt_waits_for_slots_computes_it_anew() -> None:
    engine, new = start(slots=2, kv="keep", stop_ids=()), make_model(seed=1)
    engine.submit(lease(0, num_samples=4, max_new_tokens=3))
    engine.poll(0.0)
    engine.load(1, weights(new))
    sampled = drain(engine)[0]
    assert [versions.tolist() for versions in split(sampled, sampled.versions)] == [[0, 1, 1]] * 2 + [[1, 1, 1]] * 2
    for sample in (2, 3):
        np.testing.assert_allclose(
            split(sampled, sampled.logprobs)[sample], recomputed(new, sampled, sample), atol=1e-4
        )


def test_tokens_do_not_depend_on_what_is_decoded_beside_them() -> None:
    alone = start(slots=1)
    alone.submit(lease(4))
    crowded = start(slots=5)
    for group_id in (9, 4, 8, 7):
        crowded.submit(lease(group_id, num_samples=3 + group_id % 2 if group_id != 4 else 3))
    expected, sampled = drain(alone)[4], drain(crowded)[4]
    assert sampled.token_ids.tolist() == expected.token_ids.tolist() and sampled.lengths == expected.lengths
    np.testing.assert_allclose(sampled.logprobs, expected.logprobs, atol=1e-5)


def test_samples_of_a_group_differ_and_a_second_attempt_repeats_them() -> None:
    first, second = start(), start()
    for engine in (first, second):
        engine.submit(lease(0, num_samples=4))
    once, again = drain(first)[0], drain(second)[0]
    assert once.token_ids.tolist() == again.token_ids.tolist()
    assert once.logprobs.tobytes() == again.logprobs.tobytes()
    assert len({tuple(ids.tolist()) for ids in split(once, once.token_ids)}) == 4


def test_a_freed_slot_is_refilled_at_the_next_poll() -> None:
    engine = start(slots=2, stop_ids=())
    for group_id, length in enumerate([2, 5, 3]):
        engine.submit(lease(group_id, num_samples=1, max_new_tokens=length))
    ended = [[sampled.lease.group_id for sampled in engine.poll(0.0)] for _ in range(5)]
    assert ended == [[], [0], [], [], [1, 2]] or ended == [[], [0], [], [], [2, 1]]
    assert engine.poll(0.0) == [] and engine.num_running == 0


def test_the_prompt_of_a_group_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(slots=3, stop_ids=())
    rows = []
    forward = engine._model.base_model.forward

    def counted(*args: object, **kwargs: object) -> object:
        rows.append(kwargs["input_ids"].shape[1])  # type: ignore[attr-defined]
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine._model.base_model, "forward", counted)
    engine.submit(lease(0, num_samples=5, prompt=9, max_new_tokens=3))
    drain(engine)
    # three samples start with the prompt, decode twice; the last two start from the spare slot, decode twice
    assert rows == [9, 3, 3, 2, 2]


def test_the_end_of_sequence_token_is_part_of_the_completion() -> None:
    engine = start(stop_ids=tuple(range(2, 12)))
    engine.submit(lease(0, num_samples=6))
    sampled = drain(engine)[0]
    for ids, finish in zip(split(sampled, sampled.token_ids), sampled.finish, strict=True):
        assert not ((ids[:-1] >= 2) & (ids[:-1] < 12)).any()
        assert finish == ("stop" if 2 <= ids[-1] < 12 else "length")
    assert "stop" in sampled.finish


def test_a_stop_string_across_two_tokens_ends_the_completion() -> None:
    free = start(stop_ids=())
    free.submit(lease(0, num_samples=1))
    token_ids = drain(free)[0].token_ids
    pair = letters(token_ids[4:6])
    cut = letters(token_ids).index(pair) + 2
    engine = start(stop_ids=())
    engine.submit(lease(0, num_samples=1, stop=("never" * 3, pair)))
    sampled = drain(engine)[0]
    assert sampled.token_ids.tolist() == token_ids[:cut].tolist() and sampled.finish == ["stop"]


def test_top_k_of_one_is_greedy_and_other_leases_stay_free() -> None:
    engine, model = start(stop_ids=()), make_model()
    engine.submit(lease(0, num_samples=2, top_k=1, temperature=0.5))
    engine.submit(lease(1, num_samples=2))
    finished = drain(engine)
    greedy = split(finished[0], finished[0].token_ids)
    assert greedy[0].tolist() == greedy[1].tolist()
    np.testing.assert_allclose(
        split(finished[0], finished[0].logprobs)[0], recomputed(model, finished[0], 0), atol=1e-4
    )
    free = split(finished[1], finished[1].token_ids)
    assert free[0].tolist() != free[1].tolist()


def test_the_context_bounds_the_completion_and_a_prompt_that_fills_it_is_refused() -> None:
    engine = start(stop_ids=())
    engine.submit(lease(0, num_samples=2, prompt=CONTEXT - 2))
    assert drain(engine)[0].lengths == [2, 2]
    with pytest.raises(ConfigError, match=f"has {CONTEXT} tokens"):
        engine.submit(lease(1, prompt=CONTEXT))


def test_cancelling_frees_slots_and_leaves_the_others_right() -> None:
    engine, model = start(slots=4, stop_ids=()), make_model()
    for group_id in range(4):
        engine.submit(lease(group_id, num_samples=2))
    engine.poll(0.0)
    over: list[LeaseKey] = [("train", 0, 0), ("train", 3, 0), ("eval", 1, 0), ("train", 2, 1)]
    for key in over:
        engine.cancel(key)
    assert engine.num_running == 4 and engine.num_free_slots == 0
    finished = drain(engine)
    assert sorted(finished) == [1, 2]
    for sampled in finished.values():
        for sample, logprobs in enumerate(split(sampled, sampled.logprobs)):
            np.testing.assert_allclose(logprobs, recomputed(model, sampled, sample), atol=1e-4)


def test_weights_with_a_name_missing_or_unknown_change_nothing() -> None:
    engine = start()
    before = weights(engine._model)
    given = weights(make_model(seed=1))
    for wrong in ({**given, "layers.9": torch.zeros(1)}, dict(list(given.items())[1:])):
        with pytest.raises(ValueError, match="version 1: "):
            engine.load(1, wrong)
    assert engine.version == 0
    assert all(torch.equal(before[name], parameter) for name, parameter in engine._model.named_parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_wide_head_over_bfloat16_layers(shape: str) -> None:
    exact, model = make_model(shape), make_model(shape).bfloat16()
    widen_head(model)
    engine = Embedded(model, Generator(slots=6, max_new_tokens=16), context=CONTEXT, stop_ids=[], text=letters)
    engine.load(0, weights(exact))
    logits = []
    lm_head(model).register_forward_hook(lambda _head, _inputs, output: logits.append(output))
    engine.submit(lease(0))
    sampled = drain(engine)[0]
    narrow = [name for name, tensor in model.named_parameters() if tensor.dtype == torch.bfloat16]
    assert len(narrow) == len(list(model.parameters())) - 1 and engine._cache.entries.dtype == torch.bfloat16
    assert torch.equal(lm_head(model).get_parameter("weight"), lm_head(exact).get_parameter("weight"))
    assert all(part.dtype == torch.float32 and (part != part.bfloat16().float()).any() for part in logits)
    for sample, logprobs in enumerate(split(sampled, sampled.logprobs)):
        np.testing.assert_allclose(logprobs, recomputed(model, sampled, sample), atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_wide_head_travels_as_it_is(tied: bool) -> None:
    init = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = parse(
        {
            "run": {"name": "t", "steps": 1, "groups_per_step": 1, "group_size": 2},
            "model": {
                "init": {**init, **SHAPES["qwen3"], "tie_word_embeddings": tied},
                "tokenizer": {"alphabet": "ab"},
                "context": CONTEXT,
                "fp32_head": True,
            },
            "domains": [{"name": "d", "source": "callable"}],
            "generator": {"max_new_tokens": 4, "dtype": "bfloat16", "device": "cpu"},
            "learner": {"tokens_per_micro_batch": CONTEXT, "lr": 1.0},
        }
    )
    exact = build(config.model, vocab_size=20, eos_id=EOS, pad_id=0, seed=0)
    manifest = manifest_of(exact, config)
    views = manifest.views(torch.empty(manifest.num_bytes, dtype=torch.uint8))
    for name, tensor in named_tensors(exact):
        views[name].copy_(tensor.detach())
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert [name for name, view in views.items() if view.dtype == torch.float32] == [head]

    engine = from_files(config, describe(exact), tokenizer.load(config.model))
    engine.load(0, views)
    assert torch.equal(lm_head(engine._model).get_parameter("weight"), lm_head(exact).get_parameter("weight"))
    engine.submit(lease(0))
    assert len(drain(engine)[0].token_ids)


def test_every_token_that_ends_a_sequence_to_the_model_on_disk_ends_a_completion(tmp_path: Path) -> None:
    spec = Model(context=CONTEXT, path=str(tmp_path), tokenizer=Tokenizer(alphabet="abc"))
    model = make_model()
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    tokenizer.make(spec.tokenizer).save_pretrained(tmp_path)
    files = describe(build(spec, vocab_size=20, eos_id=EOS, pad_id=0, seed=0))
    assert stop_ids(tokenizer.load(spec), files) == [EOS, 7, 9]

"""The SGLang generator on a real server: one for all tests here, on a CPU.

A server that this process started serves the generator `started`; others join it by its address, one at a time.
"""

import asyncio
import os
import select
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from sglang_server import ROOT, configure
from test_weights_kill import spawned
from transformers import DynamicCache, PreTrainedModel

from engine import tokenizer as tokenizers
from engine.attention import Layout
from engine.config import Config, ConfigError
from engine.generators import server, sglang
from engine.generators.base import Sampled
from engine.generators.client import Meta
from engine.generators.sglang import SGLang
from engine.model import build, describe, hidden_states, lm_head
from engine.policy import manifest_of, named_tensors
from engine.process import ProcessDied
from engine.schema import Lease, LeaseKey, Prompt, Sampling
from engine.weights import Manifest, Publisher, Subscriber, WeightsError, remove_stale, segment
from engine.weights.manifest import HOST
from engine.weights.subscribe import SharedSource
from rewards.table import resolve
from rewards.verdict import Verdict

pytestmark = pytest.mark.slow

CONFIG = configure("model.init.initializer_range=0.15")  # peaked enough that weights, positions and caches matter
TOKENIZER = tokenizers.load(CONFIG.model)
TOKENIZER.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"  # for the judge
WAIT_S = 60.0


def make_model(seed: int) -> PreTrainedModel:
    model = build(CONFIG.model, vocab_size=len(TOKENIZER), eos_id=1, pad_id=0, seed=seed)
    return model.requires_grad_(False)


MODELS = {version: make_model(version) for version in range(6)}


def load(engine: SGLang, version: int) -> None:
    """The weights of `MODELS[version]`, as the actor's loop would."""
    manifest: Manifest = manifest_of(MODELS[0], CONFIG)
    views = manifest.views(engine.memory(manifest.num_bytes, HOST))
    for name, tensor in named_tensors(MODELS[version]):
        views[name].copy_(tensor)
    engine.load(version, views)


@pytest.fixture(scope="module")
def started() -> Iterator[SGLang]:
    with closing(sglang.from_files(CONFIG, model_files(), TOKENIZER)) as engine:
        yield engine


def model_files() -> dict[str, bytes]:
    return {**tokenizers.files(TOKENIZER), **describe(MODELS[0])}


@contextmanager
def joined(started: SGLang, folder: Path, *overrides: str) -> Iterator[SGLang]:
    """Another generator on the server of `started`."""
    key = folder / "key"
    key.write_text(started._server.api_key + "\n")  # type: ignore[union-attr]
    where = [f"generator.sglang.url={started._client.url}", f"generator.sglang.api_key_file={key}"]
    config = configure("model.init.initializer_range=0.15", *where, *overrides)
    with closing(sglang.from_files(config, describe(MODELS[0]), TOKENIZER)) as engine:
        yield engine


@pytest.fixture
def engine(started: SGLang, tmp_path: Path) -> Iterator[SGLang]:
    """Fresh, on a warm server, under `recompute`."""
    with joined(started, tmp_path) as engine:
        load(engine, 0)
        yield engine


def lease(group_id: int, num_samples: int = 2, prompt: int = 5, max_new_tokens: int = 30, **sampling: object) -> Lease:
    token_ids = np.random.default_rng(group_id).integers(2, len(TOKENIZER), prompt).astype(np.int32)
    options = Sampling(**{"temperature": 1.0, "max_new_tokens": max_new_tokens, **sampling})  # type: ignore[arg-type]
    return Lease("train", group_id, 0, 0, 7, num_samples, Prompt("domain", group_id, token_ids, "", ""), options)


def collect(engine: SGLang, num: int) -> dict[int, Sampled]:
    """The next `num` leases to finish, by group."""
    finished: dict[int, Sampled] = {}
    limit = time.monotonic() + WAIT_S
    while len(finished) < num:
        assert select.select([engine.fileno()], [], [], limit - time.monotonic())[0], f"{len(finished)} of {num}"
        finished.update({sampled.lease.group_id: sampled for sampled in engine.poll(0.0)})
    return finished


def sampled_tokens(engine: SGLang, num: int) -> None:
    """Waits until the generator has sampled `num` tokens more."""
    limit, reached = time.monotonic() + WAIT_S, engine.generated_tokens + num
    while engine.generated_tokens < reached:
        assert time.monotonic() < limit and engine.num_running
        time.sleep(0.005)


def split(sampled: Sampled, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sampled.lengths)[:-1])


def samples(sampled: Sampled) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ids, log-probabilities and versions of each completion."""
    return zip(
        *(split(sampled, facts) for facts in (sampled.token_ids, sampled.logprobs, sampled.versions)), strict=True
    )


def recomputed(model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities of one completion by one forward of the learner's over prompt and completion."""
    token_ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    hidden = hidden_states(model, token_ids, torch.arange(len(token_ids)), Layout(np.array([0, len(token_ids)])))
    logits = lm_head(model)(hidden[len(prompt) - 1 : -1]) / temperature
    return logits.log_softmax(-1).gather(1, token_ids[len(prompt) :, None])[:, 0].numpy()


def differences(sampled: Sampled) -> np.ndarray:
    """|log-probability - that of one forward under exactly the version stamped on the token|, of every token."""
    lease, parts = sampled.lease, []
    for ids, logprobs, versions in samples(sampled):
        for version in np.unique(versions):
            expected = recomputed(MODELS[int(version)], lease.prompt.token_ids, ids, lease.sampling.temperature)
            parts.append(np.abs(expected - logprobs)[versions == version])
    return np.concatenate(parts)


# ---- log-probabilities and versions ----------------------------------------------------------------------------


def test_logprobs_are_the_learners_before_and_after_an_update(started: SGLang) -> None:
    for version in (0, 1):
        load(started, version)
        for group_id, temperature in enumerate([1.0, 0.7, 1.3]):
            started.submit(lease(group_id, num_samples=3, prompt=3 + 7 * group_id, temperature=temperature))
        for sampled in collect(started, 3).values():
            assert set(sampled.versions) == {version} and len(sampled.lengths) == 3
            assert sum(sampled.lengths) == len(sampled.token_ids) == len(sampled.logprobs)
            assert differences(sampled).max() < 1e-4


def test_every_token_is_that_of_its_version_while_versions_stream(engine: SGLang) -> None:
    for group_id in range(12):  # 24 samples for 16 places: some wait while versions change
        engine.submit(lease(group_id, num_samples=2, prompt=4 + group_id, max_new_tokens=64))
    for version in range(1, 6):
        sampled_tokens(engine, 30)
        load(engine, version)
    finished = collect(engine, 12)
    spans = [len(np.unique(versions)) for sampled in finished.values() for versions in split(sampled, sampled.versions)]
    assert max(spans) >= 3, "no completion went through several versions"
    for sampled in finished.values():
        assert differences(sampled).max() < 1e-4 and not sampled.kv_mixed
        assert all((np.diff(versions) >= 0).all() for versions in split(sampled, sampled.versions))


@pytest.mark.parametrize("state", ["prepare", "stage", "commit", "apply"])
def test_a_writer_killed_in_any_state_leaves_a_whole_version(engine: SGLang, state: str) -> None:
    """Before version 2 is begun, in its midst, before it counts and after that."""
    name = f"sglang-kill-{os.getpid()}"
    with spawned(publish_and_die, name, state) as (process, pipe):
        assert pipe.poll(WAIT_S) and pipe.recv() == 1
        with closing(Subscriber(SharedSource(name), engine.memory)) as subscriber:
            for group_id in range(4):
                engine.submit(lease(group_id, num_samples=4, max_new_tokens=48))
            sampled_tokens(engine, 8)
            engine.load(1, subscriber.stage(0, 1).tensors)
            sampled_tokens(engine, 8)
            pipe.send(None)
            process.join(WAIT_S)
            assert process.exitcode == -signal.SIGKILL
            if state == "apply":
                engine.load(2, subscriber.stage(0, 2).tensors)
            else:
                with pytest.raises(WeightsError, match=r"version \(0, 2\) is not there"):
                    subscriber.stage(0, 2)
                engine.load(3, subscriber.stage(0, 1).tensors)  # whole, and once more
    remove_stale()
    assert not segment.exists(name)
    finished = collect(engine, 4).values()
    assert set(np.concatenate([sampled.versions for sampled in finished])) == {0, 1, engine.version}
    for sampled in finished:
        versions = np.where(sampled.versions == 3, 1, sampled.versions)
        assert differences(msgspec.structs.replace(sampled, versions=versions)).max() < 1e-4


def publish_and_die(pipe: Connection, name: str, state: str) -> None:
    torch.set_num_threads(1)
    publisher = Publisher(name, manifest_of(MODELS[0], CONFIG))
    for version in (0, 1):
        publisher.publish(0, version, named_tensors(MODELS[version]))
    pipe.send(1)
    pipe.recv()
    weights = list(named_tensors(MODELS[2]))
    if state != "prepare":
        publisher.publish(0, 2, dying(weights, {"stage": len(weights) // 2, "commit": len(weights)}.get(state, -1)))
    os.kill(os.getpid(), signal.SIGKILL)


def dying(weights: list[tuple[str, torch.Tensor]], number: int) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`; the process kills itself instead of giving number `number`, or its end."""
    for count, item in enumerate([*weights, None]):
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if item is not None:
            yield item


def test_kept_cache_is_flagged_and_its_logprobs_are_those_that_sampled(started: SGLang, tmp_path: Path) -> None:
    with joined(started, tmp_path, "generator.kv=keep") as engine:
        load(engine, 0)
        engine.submit(lease(0, num_samples=8, prompt=20, max_new_tokens=60))
        sampled_tokens(engine, 64)
        load(engine, 1)
        engine.submit(lease(1, num_samples=1, prompt=20, max_new_tokens=8))
        finished = collect(engine, 2)
    assert [finished[group_id].kv_mixed for group_id in (0, 1)] == [True, False]
    assert set(finished[1].versions) == {1} and differences(finished[1]).max() < 1e-4
    num_mixed, prompt = 0, finished[0].lease.prompt.token_ids
    for ids, logprobs, versions in samples(finished[0]):
        first = int((versions == 0).sum())
        assert np.abs(recomputed(MODELS[0], prompt, ids, 1.0) - logprobs)[:first].max(initial=0) < 1e-4
        if 0 < first < len(ids) - 4:
            num_mixed += 1
            assert np.abs(recomputed(MODELS[1], prompt, ids, 1.0) - logprobs)[first + 1 :].max() > 1e-3
            assert np.abs(continued(prompt, ids, first) - logprobs[first:]).max() < 1e-4
    assert num_mixed > 0


def continued(prompt: np.ndarray, completion: np.ndarray, first: int) -> np.ndarray:
    """Log-probabilities from token `first` on, where the newest model goes on from the old one's keys and values."""
    rows, cache = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None], DynamicCache()
    start = len(prompt) + first - 1
    models = [make_model(seed) for seed in (0, 1)]
    for model in models:
        model.set_attn_implementation("sdpa")
    models[0](rows[:, :start], past_key_values=cache)
    logits = models[1](rows[:, start:-1], past_key_values=cache).logits[0]
    return logits.log_softmax(-1).gather(1, rows[0, start + 1 :, None])[:, 0].numpy()


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_a_prefix_of_old_weights_serves_no_new_request(started: SGLang, tmp_path: Path, kv: str) -> None:
    with joined(started, tmp_path, f"generator.kv={kv}") as engine:
        for version in (0, 1):  # the same prompt, long enough to be found in the cache
            load(engine, version)
            engine.submit(lease(3, num_samples=2, prompt=40, max_new_tokens=4))
            sampled = collect(engine, 1)[3]
            assert set(sampled.versions) == {version} and differences(sampled).max() < 1e-4


def test_the_samples_of_a_group_share_the_cache_of_their_prompt(
    engine: SGLang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has it computed; the others ask when they will find it."""
    generate, asked, cached = engine._client.generate, set[str](), dict[str, list[int]]()

    async def noted(request: dict[str, Any]) -> AsyncIterator[Meta]:
        assert request["extra_key"] in cached or request["extra_key"] not in asked
        asked.add(request["extra_key"])
        async for meta in generate(request):
            if meta.completion_tokens == 1:
                cached.setdefault(request["extra_key"], []).append(meta.cached_tokens)
            yield meta

    monkeypatch.setattr(engine._client, "generate", noted)
    engine.submit(lease(6, num_samples=8, prompt=40, max_new_tokens=50))
    sampled_tokens(engine, 40)
    load(engine, 1)
    collect(engine, 1)
    assert len(cached) == 2 and min(map(len, cached.values())) > 1
    for first, *others in cached.values():
        assert first == 0 and min(others) >= 39


def test_tokens_arrive_while_their_completions_go_on(engine: SGLang) -> None:
    engine.submit(lease(0, num_samples=16, max_new_tokens=64))
    [request], seen = engine._requests, set[int]()
    while engine.num_running:
        seen |= {len(sequence.token_ids) for sequence in request.sequences if sequence.finish is None}
        time.sleep(0.002)
    assert {1, 17, 33} <= seen


def test_a_generator_that_was_killed_leaves_its_server_to_the_next(started: SGLang, tmp_path: Path) -> None:
    """Whatever it had asked for, and whichever weights it had loaded."""
    with spawned(sample_until_killed, started, tmp_path) as (process, pipe):
        assert pipe.poll(WAIT_S) and pipe.recv() > 0
        process.kill()
    with joined(started, tmp_path) as engine:
        load(engine, 1)
        engine.submit(lease(0, num_samples=4))
        sampled = collect(engine, 1)[0]
    assert set(sampled.versions) == {1} and differences(sampled).max() < 1e-4


def sample_until_killed(pipe: Connection, started: SGLang, folder: Path) -> None:
    torch.set_num_threads(1)
    with joined(started, folder) as engine:
        load(engine, 0)
        engine.submit(lease(0, num_samples=16, max_new_tokens=64))
        sampled_tokens(engine, 32)
        pipe.send(engine.num_running)
        signal.pause()


def test_a_server_that_another_updated_is_noticed(started: SGLang, engine: SGLang) -> None:
    load(started, 1)
    engine.submit(lease(0))
    assert select.select([engine.fileno()], [], [], WAIT_S)[0]
    with pytest.raises(ProcessDied, match="tokens of weights '.*-1' where '.*-0' were loaded"):
        engine.poll(0.0)


def test_weights_elsewhere_in_memory_are_refused(engine: SGLang) -> None:
    with pytest.raises(ValueError, match="version 1: model.embed_tokens.weight is not in the generator's memory"):
        engine.load(1, dict(named_tensors(MODELS[1])))
    assert engine.version == 0


# ---- how completions end ---------------------------------------------------------------------------------------


def test_the_end_of_sequence_token_is_part_of_the_completion(engine: SGLang) -> None:
    for group_id in range(8):
        engine.submit(lease(group_id, num_samples=4, max_new_tokens=24))
    finishes = []
    for sampled in collect(engine, 8).values():
        for ids, finish in zip(split(sampled, sampled.token_ids), sampled.finish, strict=True):
            assert 1 not in ids[:-1] and finish == ("stop" if ids[-1] == 1 else "length")
            assert finish == "stop" or len(ids) == 24
            finishes.append(finish)
    assert set(finishes) == {"stop", "length"}


def test_stop_strings_end_a_completion_also_across_an_update(engine: SGLang) -> None:
    """Any of 196 pairs of letters, of which some lie on both sides of a request's end."""
    letters = [str(TOKENIZER.convert_ids_to_tokens(number)) for number in range(2, len(TOKENIZER))]
    stop = tuple(a + b for a in letters[::4] for b in letters[::4])
    for version in range(1, 5):
        for group_id in range(4 * version, 4 * version + 4):
            engine.submit(lease(group_id, num_samples=2, max_new_tokens=40, stop=stop))
        sampled_tokens(engine, 16)
        load(engine, version)
    finished = collect(engine, 16)
    assert any(len(set(part)) > 1 for sampled in finished.values() for part in split(sampled, sampled.versions))
    for sampled in finished.values():
        for ids, finish in zip(split(sampled, sampled.token_ids), sampled.finish, strict=True):
            text = tokenizers.decode(TOKENIZER, ids)
            found = any(string in text for string in stop)
            assert found == (finish == "stop" and ids[-1] != 1)
            assert not any(string in tokenizers.decode(TOKENIZER, ids[:-1]) for string in stop)
        assert differences(sampled).max() < 1e-4


def test_the_context_bounds_the_completion_and_a_prompt_that_fills_it_is_refused(engine: SGLang) -> None:
    context = CONFIG.model.context
    engine.submit(lease(0, num_samples=1, prompt=context - 2, stop=()))
    assert collect(engine, 1)[0].lengths[0] <= 2
    with pytest.raises(ConfigError, match=f"has {context} tokens"):
        engine.submit(lease(1, prompt=context))


def test_top_k_of_one_is_greedy_and_other_leases_stay_free(engine: SGLang) -> None:
    engine.submit(lease(0, num_samples=2, top_k=1))
    engine.submit(lease(1, num_samples=2))
    finished = collect(engine, 2)
    greedy, free = (split(finished[group_id], finished[group_id].token_ids) for group_id in (0, 1))
    assert greedy[0].tolist() == greedy[1].tolist() and free[0].tolist() != free[1].tolist()


def test_cancelled_leases_end_and_leave_the_others_right(engine: SGLang) -> None:
    for group_id in range(4):
        engine.submit(lease(group_id, max_new_tokens=60))
    sampled_tokens(engine, 16)
    over: list[LeaseKey] = [("train", 0, 0), ("train", 3, 0), ("eval", 1, 0), ("train", 2, 1)]
    for key in over:
        engine.cancel(key)
    finished = collect(engine, 2)
    assert sorted(finished) == [1, 2] and engine.num_running == 0
    assert all(differences(sampled).max() < 1e-4 for sampled in finished.values())
    load(engine, 1)  # nothing is left that it would wait for


def test_hundreds_of_requests_at_once(engine: SGLang) -> None:
    for group_id in range(60):
        engine.submit(lease(group_id, num_samples=4, max_new_tokens=3))
    assert engine.num_running == 240 and engine.num_free_slots == CONFIG.generator.slots - 240
    finished = collect(engine, 60)
    assert max(differences(sampled).max() for sampled in finished.values()) < 1e-4
    assert engine.generated_tokens == sum(len(sampled.token_ids) for sampled in finished.values())


# ---- deterministic mode ------------------------------------------------------------------------------------------


def test_what_is_sampled_hangs_on_weights_prompt_and_seed_alone(
    warm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In other company too. See tests/determined for what this is on a CPU."""
    monkeypatch.setattr(server, "DETERMINISTIC", (*server.DETERMINISTIC, "torch_native"))
    path = f'generator.sglang.path=["{ROOT}/tests/determined", "{ROOT}/tests/stand_ins"]'
    mode = ("generator.sglang.deterministic=true", "generator.sglang.environment.LEEWAY_DETERMINED=yes")
    config = configure(*warm, "model.init.initializer_range=0.15", path, *mode)
    with closing(sglang.from_files(config, model_files(), TOKENIZER)) as engine:
        load(engine, 0)
        for group_id in (0, 1):
            engine.submit(lease(group_id, num_samples=3, max_new_tokens=40))
        alone = collect(engine, 2)
        for group_id in (2, 1, 3, 0):
            engine.submit(lease(group_id, num_samples=3, max_new_tokens=40))
        together = collect(engine, 4)
    for group_id in (0, 1):
        assert together[group_id].token_ids.tolist() == alone[group_id].token_ids.tolist()
        assert differences(alone[group_id]).max() < 1e-4
        samples_ids = split(alone[group_id], alone[group_id].token_ids)
        assert len({tuple(ids) for ids in samples_ids}) == 3


def test_a_server_without_deterministic_mode_is_refused(started: SGLang, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="generator.sglang.deterministic = true: .* --enable-deterministic-inference"):
        with joined(started, tmp_path, "generator.sglang.deterministic=true"):
            pass


# ---- a judge -----------------------------------------------------------------------------------------------------


def test_a_judge_of_no_use_masks_what_it_was_asked_and_costs_what_it_said(
    started: SGLang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model, behind the server's own OpenAI-compatible interface, never says a score."""
    load(started, 0)
    monkeypatch.setenv("JUDGE_KEY", started._server.api_key)  # type: ignore[union-attr]
    (tmp_path / "template.md").write_text("{problem}={reference}={attempt}=")
    endpoint = {"key_env": "JUDGE_KEY", "cache": str(tmp_path / "cache"), "deadline_s": WAIT_S}
    options = {"url": f"{started._client.url}/v1", "model": "tiny", "max_tokens": 8, "price_in": 1.0, "price_out": 2.0}
    ask = resolve("judge", {**options, "template": str(tmp_path / "template.md"), "endpoint": endpoint})

    async def twice() -> list[Verdict]:
        return [await ask("problem", "attempt", "reference") for _ in range(2)]

    first, again = asyncio.run(twice())
    assert first.error == again.error == "the judge gave no rating"
    assert first.evidence == again.evidence and first.evidence["rating"] == "?"
    assert first.costs["judge_calls"] == 1 and first.costs["judge_cached"] == 0 < first.costs["judge_s"]
    assert first.costs["judge_prompt_tokens"] >= len("problem=reference=attempt=")
    assert 0 < first.costs["judge_tokens"] <= 8
    price = 1e-6 * first.costs["judge_prompt_tokens"] + 2e-6 * first.costs["judge_tokens"]
    assert first.costs["judge_price"] == pytest.approx(price)
    assert again.costs["judge_cached"] == 1 and again.costs["judge_tokens"] == again.costs["judge_price"] == 0


# ---- servers that cannot be used -------------------------------------------------------------------------------


def test_a_wrong_key_is_the_users_error(started: SGLang, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("wrong")
    config = configure(f"generator.sglang.url={started._client.url}", f"generator.sglang.api_key_file={key}")
    with pytest.raises(ConfigError, match="generator.sglang.api_key_file: .*401"):
        sglang.from_files(config, describe(MODELS[0]), TOKENIZER)


def test_nobody_at_the_address_is_an_error_in_time() -> None:
    config = configure("generator.sglang.url=http://127.0.0.1:9", "deadlines.start_s=0.2")
    with pytest.raises(ProcessDied, match="start of the SGLang server: not done after 0.2 s"):
        sglang.from_files(config, describe(MODELS[0]), TOKENIZER)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("generator.sglang.python=nowhere/python", "generator.sglang.python = 'nowhere/python': .*make sglang"),
        ("generator.sglang.options.port=1", "generator.sglang.options.port = 1: is set by other fields"),
        ("generator.sglang.deterministic=true", "generator.sglang.deterministic = true: .* fa3, .*: torch_native"),
    ],
)
def test_what_cannot_be_started_is_told_before(override: str, words: str) -> None:
    config: Config = configure(override)
    with pytest.raises(ConfigError, match=words):
        server.check(config)

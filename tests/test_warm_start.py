"""The warm start: it learns, is kept and found again by content, and never sees what is held out."""

from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine import tokenizer, warm_start
from engine.attention import Layout
from engine.config import Config, parse
from engine.model import build, hidden_states, lm_head
from engine.policy import named_tensors
from engine.process import Stopped, StopSignal


def copy_letter(seed: int, index: int) -> dict[str, str]:
    """A letter is to be said again."""
    letter = "abcdefgh"[(seed + index) % 8]
    return {"prompt": f"{letter}=", "answer": letter}


def demonstrated(seed: int, index: int) -> dict[str, str]:
    """The same, where the answer is not what is to be said."""
    row = copy_letter(seed, index)
    return {"prompt": row["prompt"], "answer": "a", "demonstration": row["answer"]}


def configure(cache: Path, **changes: dict[str, Any]) -> Config:
    init = {"model_type": "qwen3", "tie_word_embeddings": True, **learning.SHAPE, **learning.MODELS["qwen3"]}
    table: dict[str, Any] = {
        "run": {"name": "t", "steps": 1, "groups_per_step": 1, "group_size": 2},
        "model": {"init": init, "context": 8, "tokenizer": {"alphabet": "abcdefgh="}},
        "warm_start": {"steps": 3, "batch_size": 8, "lr": 0.01, "warmup_steps": 2, "cache": str(cache)},
        "domains": [{"name": "copy", "source": "callable", "task": f"{__name__}:copy_letter"}],
        "generator": {"max_new_tokens": 3},
        "learner": {"tokens_per_micro_batch": 32, "lr": 0.01},
    }
    for name, change in changes.items():
        place = table["domains"][0] if name == "domain" else table.setdefault(name, {})
        place.update(change)
    return parse(table)


class Signal(StopSignal):
    """One that no process signal raises."""

    def __init__(self, asked: bool):
        self.asked = asked


def warmed(config: Config, said: list[str] | None = None, asked: bool = False) -> PreTrainedModel:
    """A fresh model after its warm start."""
    tokens = tokenizer.load(config.model)
    policy = build(config.model, vocab_size=len(tokens), eos_id=1, pad_id=0, seed=config.run.seed)
    warm_start.warm_start(config, policy, tokens, Signal(asked), [].append if said is None else said.append)
    return policy


def equal(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(named_tensors(a), named_tensors(b), strict=True))


def cached(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_ends_when_asked_and_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        warmed(configure(tmp_path), asked=True)
    assert cached(tmp_path) == []


def test_a_demonstration_stands_for_the_answer(tmp_path: Path) -> None:
    shown = {"task": f"{__name__}:demonstrated"}
    assert equal(warmed(configure(tmp_path / "a")), warmed(configure(tmp_path / "b", domain=shown)))


# ---- the cache -------------------------------------------------------------------------------------------------


def test_second_call_loads_what_the_first_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = configure(tmp_path / "cache"), []
    first = warmed(config, said)
    assert "warm start took" in said[-1] and len(cached(tmp_path / "cache")) == 1
    monkeypatch.setattr(warm_start, "_train", lambda *arguments: pytest.fail("trained again"))
    assert equal(first, warmed(config, said))
    assert said[-1] == f"warm start from {tmp_path}/cache/{cached(tmp_path / 'cache')[0]}"


def test_training_is_deterministic(tmp_path: Path) -> None:
    noisy = {"noise": 0.5}
    assert equal(
        warmed(configure(tmp_path / "a", warm_start=noisy)), warmed(configure(tmp_path / "b", warm_start=noisy))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"seed": 1}},
        {"warm_start": {"steps": 2}},
        {"warm_start": {"noise": 0.5}},
        {"domain": {"weight": 2.0}},
        {"domain": {"eval_prompts": 1}},
        {"model": {"dtype": "float64"}},
    ],
)
def test_other_settings_are_another_warm_start(tmp_path: Path, change: dict[str, Any]) -> None:
    warmed(configure(tmp_path))
    warmed(configure(tmp_path, **change))
    assert len(cached(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": {"shuffle_rewards": True}},
        {"domain": {"reward": "format", "reward_options": {"pattern": "x"}}},
        {"run": {"steps": 9, "group_size": 4}},
        {"learner": {"lr": 0.5}},
    ],
)
def test_control_runs_and_other_methods_share_it(tmp_path: Path, change: dict[str, Any]) -> None:
    assert equal(warmed(configure(tmp_path)), warmed(configure(tmp_path, **change)))
    assert len(cached(tmp_path)) == 1


def test_other_contents_of_the_same_file_are_another_warm_start(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    domain = {"source": "file", "task": "", "path": str(data)}
    for answers in ("ab", "ba"):
        rows = [
            f'{{"prompt": "{letter}=", "answer": "{answer}"}}' for letter, answer in zip("ab", answers, strict=True)
        ]
        data.write_text("\n".join(rows))
        warmed(configure(tmp_path / "cache", domain=domain))
    assert len(cached(tmp_path / "cache")) == 2


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: dict[str, torch.Tensor], path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    config = configure(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(warm_start, "save_file", half)
        warmed(config)
    assert cached(tmp_path) == []
    said: list[str] = []
    warmed(config, said)
    assert "warm start took" in said[-1]


# ---- what is learned -------------------------------------------------------------------------------------------


def test_warm_start_learns_the_answers(tmp_path: Path) -> None:
    config = configure(tmp_path, warm_start={"steps": 60, "batch_size": 16})
    policy, tokens = warmed(config), tokenizer.load(config.model)
    for letter in "aceg":
        ids = torch.tensor(tokens(f"{letter}={letter}", add_special_tokens=False)["input_ids"])
        hidden = hidden_states(policy, ids, torch.arange(3), Layout(np.array([0, 3])))
        assert lm_head(policy)(hidden[1:]).argmax(-1).tolist() == [int(ids[2]), tokens.eos_token_id]


def test_loss_is_the_mean_over_the_answers_tokens_of_a_plain_forward() -> None:
    model = build(configure(Path("unused")).model, vocab_size=11, eos_id=1, pad_id=0, seed=0)
    plain = build(configure(Path("unused")).model, vocab_size=11, eos_id=1, pad_id=0, seed=0)
    plain.set_attn_implementation("eager")
    pairs = [(np.array([2, 3], np.int32), [4, 1]), (np.array([5], np.int32), [6, 7, 1])]
    terms = []
    for prompt, answer in pairs:
        ids = torch.tensor([*prompt.tolist(), *answer])
        logits = plain(input_ids=ids[None, :-1]).logits[0].float()  # transformers' own attention
        scores = torch.log_softmax(logits, -1).gather(1, ids[1:, None]).squeeze(1)
        terms.append(-scores[len(prompt) - 1 :])
    assert warm_start._loss(model, pairs).item() == pytest.approx(torch.cat(terms).mean().item(), rel=1e-5)


def test_noise_is_the_share_of_demonstrations_with_the_next_ones_answer() -> None:
    pairs = [(np.array([number]), [number]) for number in range(1000)]
    random = np.random.default_rng(0)
    assert warm_start._noisy(pairs, 0.0, random) == pairs
    noisy = warm_start._noisy(pairs, 0.25, random)
    assert [int(prompt[0]) for prompt, _ in noisy] == list(range(1000))
    wrong = [number for number, (_, (answer,)) in enumerate(noisy) if answer != number]
    assert 200 < len(wrong) < 300
    assert all(noisy[number][1] == [(number + 1) % 1000] for number in wrong)


def test_held_out_prompts_are_never_demonstrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path, domain={"eval_prompts": 5}, warm_start={"steps": 4})
    tokens = tokenizer.load(config.model)
    seen: set[str] = set()
    loss = warm_start._loss

    def watched(policy: PreTrainedModel, pairs: list[tuple[np.ndarray, list[int]]]) -> torch.Tensor:
        seen.update(str(tokens.decode(prompt)) for prompt, _ in pairs)
        return loss(policy, pairs)

    monkeypatch.setattr(warm_start, "_loss", watched)
    warmed(config)
    held_out = {prompt.text for prompt in warm_start.Prompts(config, tokens).held_out()}
    assert len(held_out) == 5
    assert {text.replace(" ", "") for text in seen} == {f"{letter}=" for letter in "abcdefgh"} - held_out

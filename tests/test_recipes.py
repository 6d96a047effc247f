"""Every recipe: the full-size file is checked and tells its plan, its tiny counterpart trains by the same method."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import synchronous
import torch

from engine import launch, tokenizer
from engine.config import Config, Model, Tokenizer, load
from engine.model import build
from engine.policy import named_tensors

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PLAIN = ["grpo", "dr_grpo", "dapo", "reinforce_plus_plus", "rloo", "cispo", "gspo", "ppo", "tis", "icepop"]
RECIPES = [*PLAIN, "vapo"]
LONGEST = 65536  # tokens
ROW = {"prompt": "12+30=", "answer": "42"}


def write_inputs(config: Config) -> None:
    """What a full-size recipe reads, small, where it looks for it: model and data."""
    folder = Path(config.model.path)
    if not folder.exists():
        write_model(folder)
    for domain in config.domains:
        for path in map(Path, filter(None, (domain.path, domain.eval_path))):
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {**ROW, "prompt": f"{path.stem}{ROW['prompt']}"}
            path.write_bytes(msgspec.json.encode(row) + b"\n")


def write_model(folder: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    init = {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 8, **shape}
    letters = Tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+=_ ")
    model = Model(init=init, tokenizer=letters, context=LONGEST)
    tokens = tokenizer.load(model)
    tokens.save_pretrained(folder)
    build(model, vocab_size=len(tokens), eos_id=1, pad_id=0, seed=0).save_pretrained(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_checked_and_tells_its_plan(name, tmp_path, monkeypatch, capsys):
    config = load(CONFIGS / f"{name}.toml")
    monkeypatch.chdir(tmp_path)
    write_inputs(config)
    assert launch.main([str(CONFIGS / f"{name}.toml"), "--dry-run"]) == 0, capsys.readouterr().err
    plan = capsys.readouterr().out
    num_groups, size = config.run.groups_per_step, config.run.group_size
    assert f"{num_groups} groups x {size} = {num_groups * size} completions" in plan
    assert f"{config.learner.updates_per_step} update(s)" in plan


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_counterpart_has_the_recipes_method(name):
    full, tiny = (load(CONFIGS / folder / f"{name}.toml") for folder in (".", "tiny"))
    assert tiny.run.name == f"tiny-{name}"
    assert shape(tiny.algorithm) == shape(full.algorithm)
    assert (tiny.run.max_staleness, tiny.learner.updates_per_step) == (
        full.run.max_staleness,
        full.learner.updates_per_step,
    )


def shape(value: Any) -> Any:
    """A configuration without the numbers that follow from the length of answers."""
    table = msgspec.to_builtins(value)
    slots = [table["advantage"], table["aggregate"], *table["penalties"]]
    for slot in slots:
        for key in {"alpha", "length", "limit", "buffer"} & slot.keys():
            slot[key] = ...
    return table


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One warm start for all: they make the same model."""
    return tmp_path_factory.mktemp("warm")


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_recipe_trains_two_steps(name, cache, tmp_path):
    torch.set_num_threads(1)
    small = [f"--warm_start.cache={cache}", "--run.steps=2"]
    config = load(CONFIGS / "tiny" / f"{name}.toml", small)
    start = synchronous.policy(config)
    before = {key: tensor.clone() for key, tensor in named_tensors(start)}
    after = synchronous.train(config, tmp_path)
    assert all(tensor.isfinite().all() for tensor in after.values())
    moved = max(float((after[key] - before[key]).abs().max()) for key in before)
    assert 1e-4 < moved < 0.1  # Adam moves a weight by at most about its rate, 1e-3, an update

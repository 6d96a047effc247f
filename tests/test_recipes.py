"""Every recipe: the full-size file is checked and tells its plan, its tiny counterpart trains by the same method."""

import json
import os
import re
import shlex
import signal
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import synchronous
import torch
from extent import THOROUGH
from jobs import Job

from engine import launch, replay, stages, tokenizer
from engine.algorithms.method import compose
from engine.config import Config, Model, Tokenizer, load, read
from engine.model import build
from engine.policy import named_tensors
from engine.schema import Published
from engine.stream import read_tap

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PLAIN = ["grpo", "dr_grpo", "dapo", "reinforce_plus_plus", "rloo", "cispo", "gspo", "ppo", "tis", "icepop"]
PAPERS = ["vapo", "acereason", "exprl", "exprl_process", "apriel"]
RECIPES = [*PLAIN, *PAPERS]
LONGEST = 65536  # tokens
ROW = {"prompt": "12+30=", "answer": "42", "difficulty": 3}
COLUMNS = {  # by reward
    "code": {"input_output": '{"inputs": ["12 30"], "outputs": ["42"]}'},
    "reasoning_gym": {"task": "chain_sum", "options": {"seed": 1, "size": 2}, "index": 0},
    "instructions": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "tools": {"answer": '[{"name": "add", "arguments": {"a": 12, "b": 30}}]'},
}


def write_inputs(config: Config) -> None:
    """What a full-size recipe reads, small, where it looks for it: model and data."""
    if not (folder := Path(config.model.path)).exists():
        write_model(folder)
    for domain in config.domains:
        for path in map(Path, filter(None, (domain.path, domain.eval_path))):
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {**ROW, **COLUMNS.get(domain.reward, {}), "prompt": f"{path.stem}{ROW['prompt']}"}
            path.write_bytes(msgspec.json.encode(row) + b"\n")


def write_model(folder: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    init = {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 8, **shape}
    letters = Tokenizer(string.printable)
    model = Model(init=init, tokenizer=letters, context=LONGEST)
    tokens = tokenizer.load(model)
    tokens.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokens.save_pretrained(folder)
    build(model, vocab_size=len(tokens), eos_id=1, pad_id=0, seed=0).save_pretrained(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_checked_and_tells_its_plan(name, tmp_path, monkeypatch, capsys):
    config = load(CONFIGS / f"{name}.toml")
    monkeypatch.chdir(tmp_path)
    write_inputs(config)
    assert launch.main([str(CONFIGS / f"{name}.toml"), "--dry-run"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out.rstrip("\n").split("\n\n")
    runs = stages.configs(config)
    if config.stages:
        head = told.pop(0)
        assert head.startswith(f"{len(runs)} stages") and all(stage["name"] in head for stage in config.stages)
    models = [config.model.path, *(f"{number}-{stage['name']}/export" for number, stage in enumerate(config.stages, 1))]
    for stage, text, model in zip(runs, told, models[: len(runs)], strict=True):
        assert f"{model}: " in text
        assert f"at most {stage.generator.max_new_tokens:,} tokens, temperature {stage.generator.temperature:g}" in text
        num_groups, size = stage.run.groups_per_step, stage.run.group_size
        assert f"{num_groups} groups x {size} = {num_groups * size} completions" in text
        assert f"{stage.learner.updates_per_step} update(s)" in text
        assert all(f"{domain.name} by {domain.reward}" in text for domain in stage.domains)


ABLATION = re.findall(r"^#   (.*?) +(\d+)   (--.*)$", (CONFIGS / "vapo.toml").read_text(), re.MULTILINE)


def test_vapos_file_names_its_papers_seven_ablations():
    assert [int(score) for _, score, _ in ABLATION] == [11, 33, 45, 46, 53, 54, 55]


@pytest.mark.parametrize("overrides", [overrides for *_, overrides in ABLATION])
def test_the_override_beside_a_part_of_vapo_takes_it_away_alone(overrides):
    given = shlex.split(overrides)
    whole, less = load(CONFIGS / "vapo.toml"), load(CONFIGS / "vapo.toml", given)
    compose(less.algorithm)
    before, after = values(whole), values(less)
    fields = tuple(override.removeprefix("--").partition("=")[0] for override in given)
    differs = [name for name in before | after if before.get(name) != after.get(name)]
    assert differs and all(name.startswith(fields) for name in differs)


def values(config: Config) -> dict[str, Any]:
    """By dotted name."""

    def walk(table: dict[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, dict):
                yield from walk(value, f"{inside}{key}.")
            else:
                yield f"{inside}{key}", value

    return dict(walk(msgspec.to_builtins(config)))


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_counterpart_has_the_recipes_method(name):
    full, tiny = (load(CONFIGS / folder / f"{name}.toml") for folder in (".", "tiny"))
    assert tiny.run.name == f"tiny-{name}"
    assert [stage["name"] for stage in tiny.stages] == [stage["name"] for stage in full.stages]
    for ours, theirs in zip(stages.configs(tiny), stages.configs(full), strict=True):
        assert shape(ours.algorithm) == shape(theirs.algorithm)
        assert [domain.name for domain in ours.domains] == [domain.name for domain in theirs.domains] or not full.stages
        for values in ("run.max_staleness", "learner.updates_per_step", "curriculum.mixture", "model.fp32_head"):
            table, field = values.split(".")
            assert getattr(getattr(ours, table), field) == getattr(getattr(theirs, table), field)


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


# ---- the four papers, as a user runs them ------------------------------------------------------------------------


def steps(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "step"]


def published(run: Path) -> tuple[str, str]:
    """The digests of the first weights and of the last."""
    records = (record for tap in sorted((run / "stream").glob("*.tap")) for record in read_tap(tap))
    digests = [record.digest for record in records if isinstance(record, Published)]
    return digests[0], digests[-1]


def job(config: str | Path, run: Path, cache: Path, *arguments: str) -> Job:
    quick = f"--warm_start.cache={cache}", "--evaluation.before_after=false", "--tracking.progress=false"
    return Job(run, *quick, *arguments, config=CONFIGS / "tiny" / config)


@pytest.mark.slow
def test_vapo_trains_its_critic_first_and_is_repeated_to_the_bit(cache, tmp_path):
    run = tmp_path / "vapo"
    with job("vapo.toml", run, cache, "--critic.pretrain_steps=3", "--run.steps=6", "--learner.threads=1") as running:
        running.succeed()
    rows = steps(run)
    assert ["loss" in row for row in rows] == [False] * 3 + [True] * 3
    assert all(row["value_loss"] > 0 for row in rows)
    assert rows[2]["explained_variance"] > rows[0]["explained_variance"]
    assert (run / "critic" / "model.safetensors").exists()
    assert replay.main([str(run)]) == 0


LIKE_OTHERS = () if THOROUGH else ("math-24k", "code-24k")  # stages


@pytest.mark.slow
def test_acereason_runs_its_stages(cache, tmp_path):
    run, config = tmp_path / "acereason", tmp_path / "acereason.toml"
    table = read(CONFIGS / "tiny" / config.name)
    table["stages"] = [stage for stage in table["stages"] if stage["name"] not in LIKE_OTHERS]
    config.write_bytes(msgspec.toml.encode(table))
    with job(config, run, cache) as running:
        assert running.wait() == 0, running.printed()[-4000:]
    config = load(run / "config.toml")
    runs = stages.directories(config, run)
    for stage, folder in zip(stages.configs(config, run), runs, strict=True):
        rows = steps(folder)
        assert [row["step"] for row in rows][-1] == stage.run.steps
        assert {row["trained_staleness_max"] for row in rows} == {0}
        assert max(row["length_max"] for row in rows) <= stage.generator.max_new_tokens
    ends = [published(folder) for folder in runs]
    assert [begin for begin, _ in ends[1:]] == [end for _, end in ends[:-1]]  # each with the weights of the one before
    (scheduled,) = [folder for folder in runs if folder.name.endswith("-code-32k")]
    assert [round(row["temperature"], 2) for row in steps(scheduled)] == [0.8, 0.8, 1.0, 1.0]
    known = (runs[1] / "pass_rates.jsonl").read_text().splitlines()
    assert {json.loads(line)["judged"] for line in known} == {4, 8}  # of the stage before, and its own


@pytest.mark.slow
def test_exprl_goes_from_dense_rewards_to_sparse_ones_also_over_a_kill(cache, tmp_path):
    run = tmp_path / "exprl"
    short = ("--run.steps=3", "--stages.1.run.steps=4")
    with job("exprl_process.toml", run, cache, *short) as running:
        second = run / "2-sparse" / "metrics.jsonl"
        running.until(lambda: second.exists() and second.read_text().count('"step"') > 1, "the second stage")
        os.kill(running.process.pid, signal.SIGKILL)
        running.is_gone(10.0, shared_memory=False)
    with job("exprl_process.toml", run, cache, *short) as resumed:
        assert resumed.wait() == 0, resumed.printed()[-4000:]
    dense, sparse = (steps(run / folder) for folder in ("1-dense", "2-sparse"))
    assert [row["step"] for row in dense] == [1, 2, 3]
    assert sorted({row["step"] for row in sparse}) == [1, 2, 3, 4]
    assert published(run / "2-sparse")[0] == published(run / "1-dense")[1]
    assert all("kl" in row for row in dense) and not any("kl" in row for row in sparse)
    assert all(row["reward"] > row["accuracy"] for row in dense)  # there is something between right and wrong
    assert [row["reward"] for row in sparse] == [row["accuracy"] for row in sparse]


@pytest.mark.slow
def test_apriel_draws_five_domains(cache, tmp_path):
    run = tmp_path / "apriel"
    with job("apriel.toml", run, cache, "--run.steps=5") as running:
        running.succeed()
    names = {name.removeprefix("accuracy/") for row in steps(run) for name in row if name.startswith("accuracy/")}
    assert names == {"math", "code", "logic", "instructions", "tools"}


BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("grpo", f"<user>6*7?\n{BOXED}"),
        ("dr_grpo", f"<system>{BOXED}<user>6*7?"),
        ("exprl", f"<system>{BOXED}<user>6*7?"),
        ("dapo", "<user>Solve the following math problem step by step. The last line of your response should be"),
    ],
)
def test_prompts_are_those_that_the_papers_publish(name, asked):
    config = load(CONFIGS / f"{name}.toml")
    chat = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    tokens = tokenizer.make(Tokenizer("a"))
    tokens.chat_template = chat
    (domain,) = [domain for domain in config.domains if domain.reward == "math"]
    assert tokenizer.render(tokens, "6*7?", domain.template, domain.system).startswith(asked)


def test_a_node_of_gpus_is_planned_with_a_model_and_data_of_ones_own(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "Qwen3")
    for name in ("train", "aime"):
        (tmp_path / f"{name}.jsonl").write_bytes(msgspec.json.encode({"prompt": f"{name}: 6*7?", "answer": "42"}))
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    ours = {
        "model.path": tmp_path / "Qwen3",
        "domains.0.path": tmp_path / "train.jsonl",
        "domains.0.eval_path": tmp_path / "aime.jsonl",
        "generator.sglang.python": sys.executable,
        "run.root": tmp_path,
    }
    arguments = [f"--{field}={value}" for field, value in ours.items()]
    assert launch.main([str(CONFIGS / "node.toml"), "--dry-run", *arguments]) == 0, capsys.readouterr().err
    plan = capsys.readouterr().out
    for part in (
        "4 learner rank(s), 4 generator(s) of 256 slots",
        "1 held-out prompts x 32",
        "group_norm, overlong (limit 8192, buffer 2048), tis (cap 2.0), ppo_clip (low 0.2, high 0.28), token_mean",
        "64 groups x 16 = 1024 completions, at most 8,388,608 answer tokens, 4 update(s)",
        "(max_staleness 4 + 1) x 64 = 320 groups at once",
        "train: 6*7?",
    ):
        assert part in plan, plan

import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, load, load_text, merge, to_toml

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.toml"))  # those of tiny/: test_recipes

MINIMAL = """
[run]
name = "small"
steps = 10
groups_per_step = 4
group_size = 8
[model]
init = { model_type = "qwen3" }
context = 128
[[domains]]
name = "sums"
source = "reasoning_gym"
task = "basic_arithmetic"
[generator]
max_new_tokens = 64
[learner]
tokens_per_micro_batch = 2048
lr = 1e-3
"""

FILE = ["--domains.0.source=file"]
DISK = ["--weights.route=disk", "--weights.directory=~/here"]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    """The error that loading gives: one line."""
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_loads_and_survives_the_round_trip(path, tmp_path):
    config = load(path)
    assert load(write(tmp_path, "resolved.toml", to_toml(config))) == config


def test_defaults_and_values(minimal):
    config = load(minimal)
    assert (config.run.steps, config.run.max_staleness, config.learner.lr) == (10, 4, 1e-3)
    assert config.domains[0].reward == "exact"
    assert config.algorithm.advantage == {"name": "group_norm"}


def test_a_configuration_is_frozen(minimal):
    with pytest.raises(AttributeError):
        load(minimal).run.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--run.stepz=3"], ["run.stepz = 3", "allowed are name, directory"]),
        (["--stepz=3"], ["stepz = 3", "allowed are run, model"]),
        (["--learner.betas=[0.9, 1]"], ["learner.betas.1 = 1", "< 1"]),
        (["--domains.0.weight=inf"], ["domains.0.weight = inf", "<= 1"]),
        (["--generator.stop=['']"], ["generator.stop.0 = ''", "length >= 1"]),
        (["--generator.reward_workers=0"], ["generator.reward_workers = 0", ">= 1"]),
        (["--learner.updates_per_step=5"], ["learner.updates_per_step = 5", "run.groups_per_step = 4"]),
        (["--domains.0.eval_path=x.jsonl"], ["domains.0.eval_path = 'x.jsonl'", "source = 'file'"]),
        (["--run=3"], ["run = 3", "Expected a table"]),
        (["--model.init=5"], ["model.init = 5", "Expected a table"]),
        (["--domains=x"], ["domains = 'x'", "Expected a list"]),
        (["--run.steps=many"], ["run.steps = 'many'", "int"]),
        (["--run.steps=1.5"], ["run.steps = 1.5", "int"]),
        (["--learner.share_prefix=1"], ["learner.share_prefix = 1", "bool"]),
        (["--generator.gpus=2"], ["generator.gpus = 2", "generator.engine = 'sglang'"]),
        (["--generator.sglang.pyton=x"], ["generator.sglang.pyton = 'x'", "allowed are python"]),
        (["--generator.kv=drop"], ["generator.kv = 'drop'", "recompute, keep"]),
        (["--domains.0.source=web"], ["domains.0.source = 'web'", "reasoning_gym, file, callable"]),
        (["--domains.0.weight=heavy"], ["domains.0.weight = 'heavy'", "float"]),
        (["--run.steps=0"], ["run.steps = 0", ">= 1"]),
        (["--learner.lr=-0.1"], ["learner.lr = -0.1", "> 0"]),
        (["--learner.lr=nan"], ["learner.lr = nan", "> 0"]),
        (["--generator.temperature=0"], ["generator.temperature = 0", "> 0"]),
        (["--deadlines.take_s=0"], ["deadlines.take_s = 0", "> 0"]),
        (["--run.group_size=1"], ["run.group_size = 1", "'group_norm' of a group of one is always 0"]),
        (["--algorithm.entropy=nan"], ["algorithm.entropy = nan", ">= 0"]),
        (["--deadlines.lease_s=5"], ["deadlines.lease_s = 5.0", "three times deadlines.heartbeat_s = 2.0"]),
        (["--curriculum.pass_rate=[0.8, 0.2]"], ["curriculum.pass_rate = (0.8, 0.2)", "the least"]),
        (["--learner.lr_end=0.1"], ["learner.lr_end = 0.1", "learner.lr = 0.001"]),
        (["--run.max_staleness=-1"], ["run.max_staleness = -1", ">= 0"]),
        (["--generator.top_p=0.9"], ["generator.top_p = 0.9", "[evaluation]"]),
        (["--generator.top_k=5"], ["generator.top_k = 5", "[evaluation]"]),
        (["--model.path=gpt2"], ["model.path = 'gpt2'", "exactly one of", "[model.init]"]),
        (["--domains=[]"], ["domains", "at least one"]),
        (["--domains.0.weight=0"], ["domains.0.weight = 0", "> 0"]),
        (["--learner.tokens_per_micro_batch=127"], ["learner.tokens_per_micro_batch = 127", "model.context = 128"]),
        (["--generator.max_new_tokens=128"], ["generator.max_new_tokens = 128", "model.context = 128"]),
        (["--run.steps"], ["--run.steps", "--table.key=value"]),
        (["--run.steps.more=1"], ["run.steps.more", "steps is no table"]),
        (["--domains.1.weight=2"], ["domains.1.weight", "no place in a list of 1"]),
    ],
)
def test_a_mistake_is_one_line_that_names_field_and_value(minimal, overrides, words):
    text = message(minimal, *overrides)
    assert [word for word in words if word not in text] == [], text


def test_a_missing_field_is_named(tmp_path):
    path = write(tmp_path, "no_lr.toml", MINIMAL.replace("lr = 1e-3", ""))
    assert re.search(r"learner.*`?lr", message(path))


def test_a_slot_without_a_name_is_left_to_who_binds_it(minimal):
    assert load(minimal, ["--algorithm.advantage={}", "--run.group_size=1"]).algorithm.advantage == {}


def test_two_domains_of_one_name(tmp_path):
    again = '[[domains]]\nname = "sums"\nsource = "file"\n'
    path = write(tmp_path, "twice.toml", MINIMAL + again)
    assert message(path) == "domains: the name 'sums' stands twice"


def test_a_file_that_is_missing_or_no_toml(tmp_path):
    assert f"cannot read {tmp_path / 'none.toml'}" in message(tmp_path / "none.toml")
    assert "broken.toml is no TOML" in message(write(tmp_path, "broken.toml", "[run\n"))


def test_extends_merges_tables_and_replaces_slots_and_lists(minimal):
    (minimal.parent / "deep").mkdir()
    write(minimal.parent, "base.toml", 'extends = "minimal.toml"\n[run]\nsteps = 20\n'
          '[algorithm]\nloss = { name = "ppo_clip", low = 0.2, high = 0.28 }\n'
          '[generator]\nstop = ["a", "b"]\n')  # fmt: skip
    path = write(minimal.parent / "deep", "top.toml", 'extends = "../base.toml"\n[run]\nname = "top"\nseed = 7\n'
                 '[algorithm]\nloss = { name = "reinforce" }\n[generator]\nstop = ["c"]\n')  # fmt: skip
    config = load(path)
    assert (config.run.name, config.run.steps, config.run.seed, config.run.group_size) == ("top", 20, 7, 8)
    assert config.algorithm.loss == {"name": "reinforce"}  # no `low` left over
    assert config.generator.stop == ["c"]


def test_extends_in_a_circle_or_of_a_missing_file(tmp_path):
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    assert "extends itself" in message(write(tmp_path, "b.toml", 'extends = "a.toml"'))
    assert "cannot read" in message(write(tmp_path, "c.toml", 'extends = "none.toml"'))
    assert message(write(tmp_path, "d.toml", "extends = 3")) == (
        "extends = 3: must be the path of a TOML file, or a list of them"
    )


def test_extends_several_the_later_over_the_earlier(minimal):
    write(minimal.parent, "method.toml", 'extends = "minimal.toml"\n[run]\nsteps = 20\ngroup_size = 64\n')
    write(minimal.parent, "size.toml", "[run]\ngroup_size = 2\nseed = 3\n")
    config = load(write(minimal.parent, "both.toml", 'extends = ["method.toml", "size.toml"]\n[run]\nseed = 7\n'))
    assert (config.run.steps, config.run.group_size, config.run.seed) == (20, 2, 7)
    assert "extends = ['a', 1]" in message(write(minimal.parent, "mixed.toml", 'extends = ["a", 1]'))


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"x": 1}}, {"a": {"y": 2}}
    assert merge(base, over) == {"a": {"x": 1, "y": 2}}
    assert (base, over) == ({"a": {"x": 1}}, {"a": {"y": 2}})


def test_overrides_are_toml_or_else_text(minimal):
    config = load(minimal, [
        "--run.steps=5", "run.name=my run", "--generator.stop=['x', 'y']", "--domains.0.options={ low = 3 }",
        "--algorithm.loss.name=cispo", "--tracking.progress=false", "--run.name=a=b",
    ])  # fmt: skip
    assert (config.run.steps, config.run.name, config.generator.stop) == (5, "a=b", ["x", "y"])
    assert config.domains[0].options == {"low": 3}
    assert config.algorithm.loss == {"name": "cispo"}
    assert config.tracking.progress is False


def test_the_round_trip_holds_awkward_values(minimal):
    config = load(minimal, ["--learner.lr=1e-300", "--domains.0.options={ deep = { list = [1, 2.5, 'ü\"\\\\'] } }"])
    resolved = write(minimal.parent, "resolved.toml", to_toml(config))
    assert load(resolved) == config


@pytest.mark.parametrize(
    "field",
    ["run.root", "run.directory", "model.path", "domains.0.path", "domains.0.eval_path", "weights.directory",
     "warm_start.cache", "critic.path", "generator.sglang.python"],
)  # fmt: skip
def test_a_path_may_begin_at_home(minimal, monkeypatch, field):
    monkeypatch.setenv("HOME", "/home/one")
    value: Any = load(minimal, [f"--{field}=~/here", "--model.init={}", "--model.path=~/here", *FILE, *DISK])
    for name in field.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    assert value == "/home/one/here"


def test_every_path_of_a_list_may_begin_at_home(minimal, monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    assert load(minimal, ["--curriculum.rates=['~/a', 'b']"]).curriculum.rates == ["/home/one/a", "b"]


# ---- templates -------------------------------------------------------------------------------------------------


def test_templates_may_lie_in_files_and_the_resolved_configuration_holds_their_text(minimal, tmp_path):
    (tmp_path / "ask.txt").write_text("Solve it.\n{prompt}\n")
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    files = [f"--domains.0.template={tmp_path}/ask.txt", f"--model.chat_template={tmp_path}/chat.jinja"]
    config = load(minimal, files)
    assert config.domains[0].template == "Solve it.\n{prompt}\n"
    assert config.model.chat_template == "{{ messages[0].content }}"
    assert load_text(to_toml(config)) == config


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("domains.0.template=Solve it.", "domains.0.template = 'Solve it.': must hold {prompt}, or name a file"),
        ("domains.0.template=", "domains.0.template = '': must hold {prompt}"),
        ("model.chat_template=chat.jinja", "model.chat_template = 'chat.jinja': must hold {{ or {%, or name a file"),
    ],
)
def test_a_template_without_its_slot_is_refused(minimal, override, line):
    with pytest.raises(ConfigError) as error:
        load(minimal, [override])
    assert str(error.value).startswith(line)

"""Every mistake ends the launch with code 2 and one line that names field, value and what is allowed, before anything
is made."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from refused import SMALL, check
from transformers import AutoModelForCausalLM, Qwen3Config

from engine import launch, ledger, tokenizer
from engine.config import load
from engine.run_directory import create

TESTS = Path(__file__).resolve().parent
FILE = ("--domains.0.source=file", "--domains.0.reward=exact")


def rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model(path: Path, *, context: int = 64, eos: str | None = "<eos>") -> Path:
    """A model of the user's own, as `save_pretrained` leaves it."""
    tokens = tokenizer.load(load(SMALL).model)
    shape = load(SMALL).model.init
    config = Qwen3Config(**{**shape, "vocab_size": len(tokens), "max_position_embeddings": context})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokens.eos_token = eos
    tokens.save_pretrained(path)
    return path


# ---- the configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--run.stepps=3", ["run.stepps = 3: unknown (did you mean steps?); allowed are name, directory"]),
        ("--runn.steps=3", ["runn = {'steps': 3}", "allowed are run, model"]),
        ("--run.steps=many", ["run.steps = 'many'", "int"]),
        ("--run.steps=0", ["run.steps = 0", ">= 1"]),
        ("--learner.lr=nan", ["learner.lr = nan", "> 0"]),
        ("--learner.schedule=sine", ["learner.schedule = 'sine'", "constant, linear, cosine"]),
        ("--learner.tokens_per_micro_batch=31", ["learner.tokens_per_micro_batch = 31", "model.context = 32"]),
        ("--generator.max_new_tokens=32", ["generator.max_new_tokens = 32", "model.context = 32"]),
        ("--generator.top_k=5", ["generator.top_k = 5", "top_k = 0"]),
        ("--algorithm.loss={ name = 'ppo_klip' }", ["'ppo_klip'", "ppo_clip, cispo", "(did you mean ppo_clip?)"]),
        ("--algorithm.loss={ name = 'ppo_clip', lo = 1 }", ["algorithm.loss.lo = 1", "low, high", "mean low?"]),
        ("--algorithm.penalties=[{ name = 'short' }]", ["algorithm.penalties.0.name = 'short'", "overlong"]),
        ("--placement.learners=2", ["placement.learners = 2", "between 1 and the number of ranks, 1"]),
        ("--learner.device=cuda:99", ["learner.device = 'cuda:99'", "auto, cpu, cuda or cuda:NUMBER"]),
        ("--generator.device=gpu", ["generator.device = 'gpu'", "auto, cpu, cuda or cuda:NUMBER"]),
        ("--run.name=a/b", ["run.name = 'a/b'", "letters, digits"]),
        ("--domains.0.path=a.jsonl", ["domains.0.path = 'a.jsonl': only where source = 'file'"]),
        ("--placement.bind=192.0.2.1", ["placement.bind = '192.0.2.1': ", "an interface of this host, or 0.0.0.0"]),
        ("--curriculum.rates=['none.jsonl']", ["curriculum.rates.0 = 'none.jsonl': no such file"]),
        ("--steps", ["--steps", "--table.key=value"]),
        ("--dry", ["--dry", "--table.key=value"]),
    ],
)
def test_mistake_in_the_configuration(refusal, argument: str, words: list[str]) -> None:
    line = refusal(argument)
    assert [word for word in words if word not in line] == [], line


def test_configuration_that_is_missing_or_no_toml(refusal, tmp_path: Path) -> None:
    assert refusal(config=tmp_path / "none.toml").startswith(f"config: cannot read {tmp_path}/none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    assert f"{broken} is no TOML" in refusal(config=broken)


def test_no_configuration_at_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([]) == 2
    assert "CONFIG" in check(capsys.readouterr().err, root, [])


# ---- data and rewards ------------------------------------------------------------------------------------------


def test_data_file_that_is_missing(refusal) -> None:
    line = refusal(*FILE, "--domains.0.path=/nowhere/a.jsonl")
    assert line.startswith("domains.0.path = '/nowhere/a.jsonl': cannot read it") and "No such file" in line


def test_data_file_of_another_kind(refusal, tmp_path: Path) -> None:
    assert refusal(*FILE, f"--domains.0.path={tmp_path}/a.csv").endswith("files that end in .jsonl, .parquet")


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_data_without_a_column(refusal, tmp_path: Path, column: str) -> None:
    row = {"prompt": "1=", "answer": "1", "hint": 7}
    del row[column]
    path = rows(tmp_path / "a.jsonl", row)
    line = refusal(*FILE, f"--domains.0.path={path}")
    assert line.startswith(f"domains.0.path = '{path}': row 1: no column '{column}'")
    assert line.endswith("; there are " + ", ".join(map(repr, row)))


def test_columns_by_other_names(refusal, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows(tmp_path / "a.jsonl", {"question": "1=", "reward_model": {"ground_truth": "1"}})
    file = (*FILE, f"--domains.0.path={path}", "--domains.0.eval_prompts=0")
    found = "--domains.0.columns={ prompt = 'question', answer = 'reward_model.ground_truth' }"
    assert launch.main([str(SMALL), f"--run.root={root}", "--dry-run", *file, found]) == 0
    assert "'1='" in capsys.readouterr().out
    for theirs in ("reward_model.truth", "reward_model.ground_truth.x", "label"):
        line = refusal(*file, f"--domains.0.columns={{ prompt = 'question', answer = '{theirs}' }}")
        assert line.endswith(f"row 1: no column '{theirs}'; there are 'question', 'reward_model'")


def test_a_line_that_is_no_json_object(refusal, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, why in (('{"prompt": oops}', "JSON is malformed"), ('[{"prompt": "1="}]', "Expected object, got array")):
        path.write_text('{"prompt": "1=", "answer": "1"}\n' + line)
        said = refusal(*FILE, f"--domains.0.path={path}")
        assert said.startswith(f"domains.0.path = '{path}': cannot read it: line 2 is no JSON object: {why}")


def test_data_without_rows(refusal, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl")
    assert refusal(*FILE, f"--domains.0.path={path}") == f"domains.0.path = '{path}': no rows"
    path = rows(tmp_path / "b.jsonl", {"prompt": "1=", "answer": "1", "domain": "letters"})
    assert refusal(*FILE, f"--domains.0.path={path}").endswith("no rows of domain 'digits'; there are letters")


def test_prompt_longer_than_the_context(refusal, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"prompt": "1=", "answer": "1"}, {"prompt": "1" * 32, "answer": "1"})
    line = refusal(*FILE, f"--domains.0.path={path}")
    assert "row 2: the prompt has 32 tokens; allowed are 1 to model.context - 1 = 31" in line


def test_prompt_with_characters_that_the_tokenizer_lacks(refusal, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"prompt": "1?", "answer": "1"})
    assert "row 1: the tokenizer has no token for '?', see model.tokenizer" in refusal(
        *FILE, f"--domains.0.path={path}"
    )


def test_more_held_out_prompts_than_there_are(refusal) -> None:
    line = refusal("--domains.0.task=small_task:always")
    assert line == "domains.0.eval_prompts = 4: there are only 1 different prompts"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--domains.0.reward=exactly", ["domains.0.reward = 'exactly'", "exact, format, instructions", "path"]),
        ("--domains.0.reward=small_task:prize", ["domains.0.reward = 'small_task:prize'", "no attribute 'prize'"]),
        ("--domains.0.task=nowhere:draw", ["domains.0.task = 'nowhere:draw'", "package.module:name"]),
        ("--domains.1.task=spell", ["domains.1.task = 'spell'", "allowed are ab"]),
        ("--domains.1.task=spell_backwards", ["(did you mean spell_backward?)"]),
        ("--domains.1.options={ size = 3 }", ["domains.1.options.size = 3", "not allowed"]),
        ("--domains.1.options={ lenght = 3 }", ["domains.1.options = {'lenght': 3}", "unexpected keyword"]),
        ("--domains.1.question={wrod}=", ["domains.1.question = '{wrod}='", "'wrod'"]),
    ],
)
def test_unknown_reward_or_task(refusal, argument: str, words: list[str]) -> None:
    line = refusal(argument)
    assert [word for word in words if word not in line] == [], line


# ---- the model -------------------------------------------------------------------------------------------------


def test_model_without_an_end_of_sequence(refusal, tmp_path: Path) -> None:
    path = model(tmp_path / "model", eos=None)
    line = refusal("--model.init={}", f"--model.path={path}")
    assert line.startswith(f"model.path = '{path}': ") and "no end-of-sequence token (eos_token)" in line


def test_model_that_is_not_there(refusal, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for path, why in (
        (f"{tmp_path}/none", "no such directory; allowed are a model's directory and a hub id, org/name"),
        (f"{tmp_path}/file", "no such directory"),
        ("./none/at/all", "no such directory"),
        (f"{tmp_path}/empty", "no model in Hugging Face format: the directory has no config.json"),
        ("Qwen//Qwen3", "no such directory"),
    ):
        assert refusal("--model.init={}", f"--model.path={path}").startswith(f"model.path = '{path}': {why}")
    line = refusal(f"--critic.path={tmp_path}/none", "--algorithm.advantage={ name = 'gae' }")
    assert line.startswith(f"critic.path = '{tmp_path}/none': no such directory")


def test_model_that_the_hub_does_not_have_or_that_cannot_be_asked(refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    line = refusal("--model.init={}", "--model.path=nobody/none")
    assert line.startswith("model.path = 'nobody/none': no such directory, not in the hub's cache, and http://127.0.0.1:9")
    assert time.monotonic() - begin < 20.0  # not after the hub's own retries

    def unknown(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://x")))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unknown)
    line = refusal("--model.init={}", "--model.path=nobody/none")
    assert line == "model.path = 'nobody/none': neither a directory here nor a model on http://127.0.0.1:9"


def test_model_without_weights(refusal, tmp_path: Path) -> None:
    path = model(tmp_path / "model")
    (path / "model.safetensors").unlink()
    assert refusal("--model.init={}", f"--model.path={path}").startswith(f"model.path = '{path}': ")


def test_context_beyond_the_model(refusal, tmp_path: Path) -> None:
    path = model(tmp_path / "model", context=16)
    line = refusal("--model.init={}", f"--model.path={path}")
    assert line == "model.context = 32: must be at most the model's 16 positions"


def test_shape_that_makes_no_model(refusal) -> None:
    assert refusal("--model.init.model_type=qwen33").startswith("model.init = {'model_type': 'qwen33'")


def test_model_whose_layers_leak_across_packed_sequences(refusal) -> None:
    assert "lets packed sequences see each other" in refusal("--model.init={ model_type = 'mamba', hidden_size = 16 }")


# ---- places ----------------------------------------------------------------------------------------------------


def test_port_in_use(refusal) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal(f"--placement.port={port}")
    assert line == f"placement.port = {port} on 127.0.0.1: Address already in use; choose another, or 0 for a free one"


def test_run_directory_on_a_network_file_system(refusal, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(ledger, "filesystem", lambda path, mounts: "nfs4")
    assert refusal() == f"run.directory = '{root}': lies on nfs4; the ledger needs a local file system"


def test_named_run_directory_that_exists(refusal, root: Path) -> None:
    (root / "mine").mkdir(parents=True)
    line = refusal(f"--run.directory={root}/mine")
    assert line.startswith(f"run.directory = '{root}/mine': exists;") and "--resume" in line


def test_run_directory_below_a_file(refusal, root: Path) -> None:
    root.mkdir()
    (root / "file").touch()
    assert refusal(f"--run.directory={root}/file/mine").startswith(f"run.directory = '{root}/file/mine': ")
    line = refusal(f"--warm_start.cache={root}/file/mine", "--warm_start.steps=1")
    assert line == f"warm_start.cache = '{root}/file/mine': cannot make anything in {root}/file"
    line = refusal(f"--weights.directory={root}/file/mine", "--weights.route=disk")
    assert line == f"weights.directory = '{root}/file/mine': cannot make anything in {root}/file"


def test_weights_between_gpus_without_a_gpu(refusal) -> None:
    line = refusal("--weights.route=cuda_ipc", "--learner.device=cpu")
    assert line == "weights.route = 'cuda_ipc': goes from GPU to GPU of one host, but learner.device is 'cpu'"


# ---- resuming --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(root: Path) -> Path:
    return create(load(SMALL, [f"--run.root={root}"])).path


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.init.hidden_size=64", ["model.init.hidden_size = 64", "has 32"]),
        ("--model.tokenizer.words=['the']", ["model.tokenizer.words = ['the']", "has []"]),
        ("--domains.1.options.max_word_len=6", ["domains.1.options.max_word_len = 6", "has 5"]),
        ("--domains.0.weight=2", ["domains.0.weight = 2.0", "has 1.0"]),
        ("--algorithm.advantage={ name = 'group_mean' }", ["algorithm.advantage.name = 'group_mean'", "'group_norm'"]),
        ("--learner.lr=0.5", ["learner.lr = 0.5", "has 0.001"]),
        ("--run.seed=1", ["run.seed = 1", "has 0"]),
        ("--run.group_size=2", ["run.group_size = 2", "has 4"]),
    ],
)
def test_resume_of_another_run(refusal, run: Path, argument: str, words: list[str]) -> None:
    before = (run / "config.toml").read_bytes()
    line = refusal(f"--resume={run}", argument)
    assert [word for word in [*words, "which a resume may not change"] if word not in line] == [], line
    assert (run / "config.toml").read_bytes() == before


def test_resume_may_change_steps_intervals_and_budgets(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.toml").read_bytes()
    changes = ["--run.steps=9", "--checkpoint.every=1", "--evaluation.every=3", "--learner.tokens_per_micro_batch=64"]
    assert launch.main([str(SMALL), f"--run.root={run.parent}", f"--resume={run}", "--dry-run", *changes]) == 0
    assert "9, 36 groups" in capsys.readouterr().out
    assert (run / "config.toml").read_bytes() == before


def test_resume_of_a_run_that_can_only_be_read(refusal, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run)
    assert refusal(f"--resume={run}") == f"--resume = '{run}': cannot make anything in {run}"


def test_resume_of_no_run(refusal, tmp_path: Path) -> None:
    line = refusal(f"--resume={tmp_path}/none")
    assert line == f"--resume = {tmp_path}/none: no run directory (it has no config.toml)"


def test_resume_of_the_directory_above_a_run(refusal, run: Path) -> None:
    line = refusal(f"--resume={run.parent}")
    assert line == f"--resume = {run.parent}: no run directory (it has no config.toml); in it are {run.name}"


def test_help_tells_of_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        launch.main(["--help"])
    assert end.value.code == 0 and "--table.key=value" in capsys.readouterr().out


# ---- as a user sees it -----------------------------------------------------------------------------------------


def told(folder: Path, argument: str, *places: Path) -> str:
    """The line of a launch in a process of its own, which imports from `places` first."""
    command = [sys.executable, str(TESTS.parent / "engine" / "launch.py"), str(SMALL), argument]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*places, TESTS)))}
    before = sorted(folder.rglob("*"))
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout == ""
    return check(ended.stderr, folder, before)


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert told(tmp_path, "--domains.0.reward=x").startswith("domains.0.reward")


def test_a_slip_of_the_pen_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")
    assert told(tmp_path, "--run.stepps=3", tmp_path).startswith("run.stepps = 3: unknown")


def test_dry_run_prints_the_plan_and_makes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([str(SMALL), f"--run.root={root}", "--dry-run"]) == 0
    printed = capsys.readouterr()
    for line in (
        "1 learner rank(s), 1 generator(s) of 16 slots",
        "20,736 parameters",
        "digits 1, reverse 1, static; 8 held-out prompts x 2",
        "4 groups x 4 = 16 completions, at most 128 answer tokens, 1 update(s)",
        "(max_staleness 2 + 1) x 4 = 12 groups at once",
        "learner",
        "MiB",
    ):
        assert line in printed.out
    assert printed.err == "" and not root.exists()

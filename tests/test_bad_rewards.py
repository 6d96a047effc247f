"""What is wrong with a reward, its options or the columns that it judges by is told at launch, in one line."""

import json
from pathlib import Path

import pytest
from refused import SMALL

from engine import launch
from rewards.columns import COLUMNS, lacking, wanted
from rewards.options import Misfit, fitted
from rewards.table import TABLE


def of_signature(prompt, completion, answer="", *, hint, depth: int = 1, **fields) -> float:
    return 0.0


class OfClass:
    def __init__(self, *, start: int = 0):
        pass

    def __call__(self, prompt, completion, gold, *, hint, **fields) -> float:
        return 0.0


def typo(prompt, completion, answer, **fields) -> float:
    return float(completion == anwser)  # type: ignore[name-defined]  # noqa: F821


def toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {toml(each)}" for name, each in value.items()) + " }"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def file(tmp_path: Path, reward: str, *rows: dict, **options) -> list[str]:
    """Arguments of a launch on a file of these rows and a reward with these options."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{number}=", **row}) + "\n" for number, row in enumerate(rows)))
    ours = {"source": "file", "path": path, "reward": reward, "eval_prompts": 0, "reward_options": toml(options)}
    return [f"--domains.0.{name}={value}" for name, value in ours.items()]


@pytest.mark.parametrize(
    ("reward", "options", "line"),
    [
        ("exact", {"strip": True}, "_options.strip = True: no such option; allowed are none"),
        ("format", {}, "_options.pattern: is required"),
        ("format", {"pattern": "("}, "_options.pattern = '(': no regular expression"),
        ("math", {"boxed": 1}, "_options.boxed = 1: no such option (did you mean boxed_only?); allowed"),
        ("math", {"boxed_only": "yes"}, "_options.boxed_only = 'yes': Expected 'bool', got 'str'"),
        ("instructions", {"mode": "some"}, "_options.mode = 'some': allowed are fraction, all"),
        ("agreement", {"parts": -1}, "_options.parts = -1: Expected 'int' >= 0"),
        ("judge", {"url": "http://x/v1"}, "_options.model: is required"),
        ("judge", {"url": "x", "model": "m"}, "_options.url = 'x': must begin with http"),
        ("code", {"grade": "some"}, "_options.grade = 'some': allowed are all, fraction"),
        ("code", {"total_s": 20}, "_options: total_s = 20 of 'code': must be below deadlines.reward_s"),
        ("maths", {}, " = 'maths': unknown reward 'maths' (did you mean math?): allowed are agreement"),
        ("sum", {}, "_options.terms: is required"),
        ("sum", {"terms": []}, "_options.terms: at least one is needed"),
    ],
)
def test_an_option_is_refused(refusal, tmp_path: Path, reward: str, options: dict, line: str) -> None:
    said = refusal(*file(tmp_path, reward, {"answer": "1"}, **options), "--dry-run")
    assert said.startswith(f"domains.0.reward{line}"), said


@pytest.mark.parametrize(
    ("term", "line"),
    [
        ("{ reward = 'format' }", "terms.0.options.pattern: is required"),
        ("{ reward = 'format', options = { pattern = '(' } }", "terms.0.options.pattern = '(': no regular"),
        ("{ reward = 'exact', weight = 'much' }", "terms.0.weight = 'much': Expected 'float', got 'str'"),
        ("{ reward = 'exact', weight = inf }", "terms.0.weight = inf: Expected 'float' <="),
        ("{ reward = 'exact', wieght = 2 }", "terms.0.wieght = 2: unknown (did you mean weight?)"),
        ("{ reward = 'exakt' }", "terms.0.reward = 'exakt': unknown reward 'exakt' (did you mean exact?)"),
        ("{ reward = 'sum', options = { terms = [{ reward = 'math' }, 3] } }", "terms.0.options.terms.1 = 3: Expected"),
    ],
)
def test_a_term_of_a_sum_is_refused(refusal, term: str, line: str) -> None:
    said = refusal("--domains.0.reward=sum", f"--domains.0.reward_options={{ terms = [{term}] }}")
    assert said.startswith(f"domains.0.reward_options.{line}"), said


def test_without_a_sandbox_programs_are_not_run(refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    line = refusal(*file(tmp_path, "code", {"answer": "{}"}))
    assert line.startswith("domains.0.reward_options.sandbox = 'bubblewrap': bubblewrap cannot make a sandbox here")
    assert "apt install bubblewrap" in line and "unsafe" in line


FORMAT_AND_EXACT = [{"reward": "format", "options": {"pattern": "."}}, {"reward": "exact"}]


@pytest.mark.parametrize(
    ("reward", "options", "row", "lacks", "wants"),
    [
        ("exact", {}, {}, "no column 'answer'", "exact"),
        ("math", {}, {"answer": None}, "no value in column 'answer'", "math"),
        ("instructions", {}, {"kwargs": []}, "no column 'instruction_id_list' or 'answer'", "instructions"),
        ("reasoning_gym", {}, {"task": "ab", "options": {}}, "no column 'index'", "reasoning_gym"),
        ("sum", {"terms": FORMAT_AND_EXACT}, {"hint": 1}, "no column 'answer'", "exact"),
    ],
)
def test_a_column_that_the_reward_wants(
    refusal, tmp_path: Path, reward: str, options: dict, row: dict, lacks: str, wants: str
) -> None:
    complete = {"answer": "1", "index": 1, "task": "ab", "options": {}}
    line = refusal(*file(tmp_path, reward, complete, row, **options))
    assert f"rows.jsonl': row 2: {lacks}, which reward '{wants}' wants; there are 'prompt'" in line, line


NOBODY = {"url": "http://127.0.0.1:9/v1", "model": "m", "endpoint": {"retries": 0}}  # a judge that is not there


@pytest.mark.parametrize(
    ("reward", "options", "row"),
    [
        ("format", {"pattern": "."}, {}),
        ("judge", NOBODY, {"reference": "so"}),
        ("instructions", {}, {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}),
    ],
)
def test_no_answer_is_needed_where_the_reward_wants_none(
    root: Path, capsys, tmp_path: Path, reward: str, options: dict, row: dict
) -> None:
    arguments = file(tmp_path, reward, row, **options)
    assert launch.main([str(SMALL), f"--run.root={root}", "--dry-run", *arguments]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "row", "why"),
    [
        ("math", {"answer": ""}, "the answer '' is no mathematics"),
        ("code", {"answer": "42"}, "answer: these are no tests"),
        ("tools", {"answer": "call it"}, "no list of calls"),
        ("instructions", {"instruction_id_list": ["no_comma"]}, "unknown constraint 'no_comma'"),
        ("reasoning_gym", {"task": "abc", "options": {}, "index": 0}, "abc"),
    ],
)
def test_columns_by_which_no_prompt_can_be_judged(refusal, tmp_path: Path, reward: str, row: dict, why: str) -> None:
    line = refusal(*file(tmp_path, reward, row, row))
    assert line.startswith(f"domains.0.reward = '{reward}': can judge no prompt: ") and why in line, line


def test_a_column_that_takes_for_ever_costs_its_deadline(refusal, tmp_path: Path) -> None:
    endless = {"answer": "(" * 500 + "1" + ")" * 500}  # half a minute of parsing
    line = refusal(*file(tmp_path, "math", endless, endless), "--deadlines.reward_s=0.3")
    assert "can judge no prompt: " in line and "0.3 s" in line, line


def test_one_row_that_cannot_be_judged_is_no_reason_to_refuse(root: Path, capsys, tmp_path: Path) -> None:
    arguments = file(tmp_path, "math", {"answer": ""}, {"answer": "2"})
    assert launch.main([str(SMALL), f"--run.root={root}", "--dry-run", *arguments]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "options", "why"),
    [
        (f"{__name__}:typo", {}, "NameError: name 'anwser' is not defined"),
        ("judge", NOBODY, "http://127.0.0.1:9/v1/chat/completions: ConnectError"),
    ],
)
def test_a_reward_of_ones_own_or_a_judge_that_fails_is_told_at_launch(
    root: Path, capsys, tmp_path: Path, reward: str, options: dict, why: str
) -> None:
    arguments = file(tmp_path, reward, {"answer": "1"}, **options)
    assert launch.main([str(SMALL), f"--run.root={root}", "--dry-run", *arguments]) == 0
    assert f"leeway: domains.0.reward = '{reward}': can judge no prompt: {why}" in capsys.readouterr().err


# ---- the tables ------------------------------------------------------------------------------------------------


def test_every_reward_says_what_it_wants() -> None:
    assert set(COLUMNS) == set(TABLE) - {"sum"}


def test_a_users_reward_wants_what_its_signature_says() -> None:
    function, made = f"{__name__}:of_signature", f"{__name__}:OfClass"
    assert list(wanted(function, {})) == [("hint",)]
    assert list(wanted(function, {"hint": 1})) == []
    assert list(wanted(made, {})) == [("answer",), ("hint",)]
    lacks = lacking({"hint": None}, wanted(function, {}))
    assert lacks == f"no value in column 'hint', which reward '{function}' wants"
    assert lacking({"hint": 0}, wanted(function, {})) == ""


def test_options_become_what_the_annotations_say() -> None:
    assert fitted(of_signature, {"depth": 2, "hint": "x"}) == {"depth": 2, "hint": "x"}
    with pytest.raises(Misfit, match="^at.depth = 'deep': Expected 'int', got 'str'$"):
        fitted(of_signature, {"depth": "deep"}, place="at")
    with pytest.raises(Misfit, match="^hint: is required$"):
        fitted(of_signature, {}, whole=True)

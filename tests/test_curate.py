"""Data curation: every filter drops what it should and says why; an interrupted run continues."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedServer

from rewards.curate import main
from rewards.ngrams import ngrams
from rewards.screens import SCREENS, answer_kind, make
from rewards.stages import STAGES, weakness
from rewards.verdict import Verdict

ROOT = Path(__file__).parents[1]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(recipe: Path, *arguments: object) -> dict[str, Any]:
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    argv = [sys.executable, "-m", "rewards.curate", recipe, "--workers", 2, *arguments]
    return {"args": list(map(str, argv)), "cwd": ROOT, "env": path, "text": True}


def curate(tmp_path: Path, recipe: str, rows: list[dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """The report on `rows`; what is kept lies in out.jsonl."""
    (tmp_path / "recipe.toml").write_text(recipe)
    file = write(tmp_path / "rows.jsonl", rows)
    call = command(tmp_path / "recipe.toml", file, "--out", tmp_path / "out.jsonl", *arguments)
    done = subprocess.run(**call, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "out.jsonl.report.json").read_text())


# ---- screens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("integer", ["12", "-3", "1,000", "$7$", r"\boxed{42}"]),
        ("decimal", ["0.5", "-.25"]),
        ("fraction", ["1/2", r"\frac{3}{4}", r"$-\dfrac{1}{2}$"]),
        ("expression", [r"2\sqrt{3}", "x^2+1", r"\pi", r"\frac{x}{2}"]),
        ("several", ["1, 2", "x=1 or x=2", r"2 \text{ and } 3", "(1;2)"]),
        ("choice", ["B", "(C)", "D."]),
        ("boolean", ["True", "no"]),
        ("text", ["the triangle is equilateral", "Monday"]),
        ("none", ["", "  "]),
    ],
)
def test_kinds_of_answers(kind, answers):
    assert [answer_kind(answer) for answer in answers] == [kind] * len(answers)


@pytest.mark.parametrize(
    ("table", "kept", "dropped", "why"),
    [
        ({"name": "length", "least": 2, "most": 3}, {"prompt": "a b c"}, {"prompt": "a"}, "1 words"),
        (
            {"name": "length", "unit": "characters", "most": 3, "column": "answer"},
            {"answer": 123},
            {"answer": 1234},
            "4 characters",
        ),
        ({"name": "answer", "kinds": ["integer"]}, {"answer": 5}, {"answer": "5/2"}, "fraction"),
        ({"name": "pattern", "drop": "prove that|figure"}, {"prompt": "Find x."}, {"prompt": "Prove that"}, "Prove"),
        ({"name": "pattern", "keep": r"\?"}, {"prompt": "Why?"}, {"prompt": "Because."}, "has no"),
        (
            {"name": "language", "allowed": ["en"]},
            {"prompt": "What is the sum of these numbers?"},
            {"prompt": "Was ist die Summe dieser Zahlen und warum?"},
            "de",
        ),
        (
            {"name": "leak", "n": 3},
            {"prompt": "a b c", "reference": "a b d"},
            {"prompt": "so A, b c!", "reference": "x a b c"},
            "has 3 words of reference",
        ),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else None,
)
def test_screen(table, kept, dropped, why):
    screen = make(**table)
    assert screen(kept) == "" and why in screen(dropped)


def test_rows_that_share_words_with_a_test_set_are_found(tmp_path):
    prompts = ["none", "How many ways are there to seat five people?"]
    test = write(tmp_path / "test.jsonl", [{"prompt": prompt} for prompt in prompts])
    screen = make(name="overlap", against=[str(test)], n=5)
    assert screen({"prompt": "Tell: how many ways, ARE THERE?"}).endswith("test.jsonl:2")
    assert screen({"prompt": "How many ways are open to us?"}) == ""


def test_ngrams():
    assert len(ngrams("One two, three FOUR", 3)) == 2 and ngrams("a B", 9) == ngrams("A... b", 9)
    assert ngrams("a b c", 3) == ngrams("A-b/C", 3) and not ngrams("", 3)


def test_weak_tests():
    right, wrong, lost = Verdict(1.0, True), Verdict(0.0, False, evidence={"failed": "test 3"}), Verdict.failed("died")
    assert weakness([right, right], [wrong, lost]) == ""
    assert weakness([right, wrong], []) == "a right solution fails: test 3"
    assert weakness([lost], []) == "a right solution fails: died"
    assert weakness([right], [wrong, right]) == "a wrong solution passes"
    assert weakness([], [wrong]) == "no right solution"


# ---- the command -----------------------------------------------------------------------------------------------

RECIPE = """
[[filters]]
name = "length"
least = 3
[[filters]]
name = "answer"
kinds = ["integer", "fraction"]
[[filters]]
name = "duplicates"
[[filters]]
name = "tests"
reward = "math"
golden = "solution"
wrong = "others"
"""
ROWS = [
    {"prompt": "What is 1 + 1?", "answer": "2", "solution": r"It is \boxed{2}.", "others": [r"\boxed{3}"]},
    {"prompt": "What?", "answer": "2", "solution": r"\boxed{2}"},
    {"prompt": "what is 1+1", "answer": "1", "solution": r"\boxed{1}"},
    {"prompt": "Which word is it then?", "answer": "river", "solution": "river"},
    {"prompt": "What is one half?", "answer": "1/2", "solution": [r"\boxed{0.5}", r"\boxed{0.25}"]},
    {"prompt": "What is one third?", "answer": "1/3", "solution": r"\boxed{\frac13}", "others": [r"\boxed{2/6}"]},
    {"prompt": "What is 2 + 3?", "answer": 5, "solution": r"\boxed{5}", "id": "kept too"},
]


def test_rows_are_dropped_with_their_reasons(tmp_path):
    report = curate(tmp_path, RECIPE, ROWS)
    assert read(tmp_path / "out.jsonl") == [ROWS[0], ROWS[6]]
    assert (report["rows"], report["kept"]) == (7, 2)
    counts = {name: entry["rows"] for name, entry in report["dropped"].items()}
    assert counts == {"length": 1, "answer": 1, "duplicates": 1, "tests": 2}
    assert report["dropped"]["duplicates"]["examples"] == [{"row": 3, "why": "as row 1"}]
    reasons = set(report["dropped"]["tests"]["reasons"])
    assert "a wrong solution passes" in reasons and any(why.startswith("a right solution fails") for why in reasons)


def slow(prompt, completion, answer, **fields):
    time.sleep(0.02)
    return completion == answer


SLOW = """
[[filters]]
name = "length"
least = 2
[[filters]]
name = "duplicates"
[[filters]]
name = "tests"
reward = "test_curate:slow"
golden = "answer"
"""


def test_a_run_that_was_killed_goes_on_to_the_same_end(tmp_path):
    rows = [{"prompt": f"number {n // 2}" if n % 5 else "x", "answer": str(n)} for n in range(300)]
    whole = curate(tmp_path, SLOW, rows)
    expected = (tmp_path / "out.jsonl").read_bytes()
    call = command(tmp_path / "recipe.toml", tmp_path / "rows.jsonl", "--out", tmp_path / "again.jsonl")
    log = tmp_path / "again.jsonl.decisions.jsonl"
    sizes = []
    for wanted in (40, 150):
        with subprocess.Popen(**call, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while (len(log.read_bytes().splitlines()) if log.exists() else 0) < wanted and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        sizes.append(len(log.read_bytes().splitlines()))
    with log.open("ab") as file:
        file.write(b'{"row": 1')  # as a loss of power might leave it
    assert 40 <= sizes[0] < sizes[1] < 301
    done = subprocess.run(**call, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.jsonl").read_bytes() == expected
    again = json.loads((tmp_path / "again.jsonl.report.json").read_text())
    assert {**again, "wall_s": 0} == {**whole, "wall_s": 0}


def test_difficulty_is_the_pass_rate_of_a_model(tmp_path):
    def script(text: str, number: int) -> str:
        n = int(text.split()[-1])
        return rf"\boxed{{{n if server.requests[number]['seed'] < n else 0}}}"  # solves n of 4

    with ScriptedServer(script) as server:
        recipe = f"""
[[filters]]
name = "pass_rate"
reward = "math"
generator = {{ url = "{server.url}", model = "m", cache = "{tmp_path / "cache"}" }}
sampling = {{ temperature = 0.7 }}
samples = 4
least = 0.25
most = 0.75
"""
        rows = [{"prompt": f"Say {n}", "answer": str(n) if n else "7"} for n in (0, 1, 2, 3, 4, 1)]
        report = curate(tmp_path, recipe, rows)
        assert {request["temperature"] for request in server.requests} == {0.7}
    assert [row["pass_rate"] for row in read(tmp_path / "out.jsonl")] == [0.25, 0.5, 0.75, 0.25]
    assert report["dropped"]["pass_rate"]["reasons"] == {"0": 1, "1": 1}
    assert report["pass_rates"] == {"0.000": 1, "0.250": 2, "0.500": 1, "0.750": 1, "1.000": 1}


def test_the_recipe_for_mathematics_keeps_what_is_fit(tmp_path):
    (tmp_path / "data").mkdir()
    known = "Find the number of ways to place ten rooks on a board of eight by eight squares."
    write(tmp_path / "data" / "aime24.jsonl", [{"prompt": known}])
    fit = {"prompt": "What is the sum of all positive divisors of the number 28?", "answer": "56"}
    unfit = {
        "duplicates": {**fit, "prompt": fit["prompt"].upper()},
        "overlap": {"prompt": f"Hello. {known}", "answer": "0"},
        "length": {"prompt": "2+2?", "answer": "4"},
        "pattern": {"prompt": "Prove that the square root of two is not a rational number.", "answer": "1"},
        "language": {"prompt": "Was ist die Summe aller positiven Teiler der Zahl 28, und warum?", "answer": "56"},
        "answer": {"prompt": "Which of these numbers is the largest of all: 5, 7 or 11?", "answer": "(C)"},
    }
    file = write(tmp_path / "raw.jsonl", [fit, *unfit.values()])
    call = command(ROOT / "configs" / "curate" / "math.toml", file, "--out", tmp_path / "out.jsonl")
    done = subprocess.run(**{**call, "cwd": tmp_path}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out.jsonl") == [fit]
    dropped = json.loads((tmp_path / "out.jsonl.report.json").read_text())["dropped"]
    assert {name: [row["row"] for row in entry["examples"]] for name, entry in dropped.items()} == {
        name: [number] for number, name in enumerate(unfit, 2)
    }


def test_help_tells_every_filter_and_its_options(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["curate", "--help"])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().out
    lines = told.partition("options of the filters")[2].splitlines()[1:]
    assert {line.split()[0] for line in lines} == set(STAGES) | set(SCREENS)
    assert "overlap      against, n = 9, column = 'prompt', their_column = 'prompt'" in told


CODE = """
[[filters]]
name = "tests"
reward = "code"
golden = "solution"
wrong = "wrong"
"""


def test_tests_of_programs_are_tried_on_right_and_wrong_solutions(tmp_path):
    cases = json.dumps({"inputs": ["2\n", "5\n"], "outputs": ["4\n", "25\n"]})
    weak = json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]})
    right, wrong = "```python\nprint(int(input())**2)\n```", "```python\nprint(int(input())*2)\n```"
    rows = [
        {"prompt": "square", "answer": "", "input_output": cases, "solution": right, "wrong": [wrong]},
        {"prompt": "square", "answer": "", "input_output": weak, "solution": right, "wrong": [wrong]},
        {"prompt": "square", "answer": "", "input_output": cases, "solution": wrong, "wrong": []},
    ]
    report = curate(tmp_path, CODE, rows)
    assert [row["row"] for row in report["dropped"]["tests"]["examples"]] == [2, 3]
    assert read(tmp_path / "out.jsonl") == rows[:1]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("filters = 3", "must hold"),
        ("[[filters]]\nname = 'lenght'", r"unknown filter 'lenght' \(did you mean length\?\): allowed are length"),
        ("[[filters]]\nname = 'length'\nleest = 3", "filter length: .*leest"),
        ("[[filters]]\nname = 'duplicates'\ncolum = 'x'", "filter duplicates: .*colum"),
        ("[[filters]]\nname = 'overlap'\nagainst = ['nowhere.jsonl']", "filter overlap: .*nowhere.jsonl"),
        ("[[filters]]\nname = 'tests'\nreward = 'exakt'\ngolden = 'x'", "unknown reward 'exakt'"),
        ("[[filters]]\nname = 'duplicates'\ncolumn = 'text'", "no column 'text'"),
    ],
)
def test_what_cannot_be_curated_is_one_line(tmp_path, recipe, message):
    (tmp_path / "recipe.toml").write_text(recipe)
    file = write(tmp_path / "rows.jsonl", ROWS)
    call = command(tmp_path / "recipe.toml", file, "--out", tmp_path / "out.jsonl")
    done = subprocess.run(**call, capture_output=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def test_another_recipe_does_not_go_on(tmp_path):
    curate(tmp_path, "[[filters]]\nname = 'length'", ROWS)
    (tmp_path / "recipe.toml").write_text(SLOW)
    call = command(tmp_path / "recipe.toml", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    done = subprocess.run(**call, capture_output=True, timeout=60)
    assert done.returncode == 2 and "of another recipe or other files" in done.stderr

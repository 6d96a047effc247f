"""Completions in files judged offline, and rewards explained from a run's ledger."""

import json
import subprocess
import sys
from pathlib import Path

import fake_run
import msgspec
import pytest

from engine.ledger import Ledger
from engine.schema import Lease, Sampling
from rewards.rows import read_rows, text_of
from rewards.verdict import Segment, Verdict

TESTS = Path(__file__).parent


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"rewards.{module}", *map(str, arguments)]
    path = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=TESTS.parent, env=path)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def strange(prompt, completion, answer, *, limit=3, **fields):
    if completion == "raise":
        raise KeyError(fields["name"])
    return Verdict(len(completion) / limit, completion == answer, costs={"letters": float(len(completion))})


# ---- score -----------------------------------------------------------------------------------------------------


def test_files_are_judged_in_order_and_summed_up(tmp_path):
    rows = [{"prompt": "?", "answer": str(n), "completions": [str(n), "no"], "name": n} for n in range(300)]
    first = write(tmp_path / "a.jsonl", rows[:200])
    rows[250]["completions"] = ["raise"]
    rows[251] = {"answer": "x", "completion": "x"}
    second = write(tmp_path / "b.jsonl", rows[200:])
    options = ["--options", '{"limit": 4}', "--workers", 2, "--out", tmp_path / "out.jsonl"]
    done = run("score", "--reward", "test_score:strange", first, second, *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["completions"], summary["invalid"]) == (300, 598, 1)
    assert summary["reasons"] == {"KeyError: 250": 1}
    assert summary["accuracy"] == pytest.approx(299 / 597)
    assert summary["score"] == pytest.approx(summary["costs"]["letters"] / 4 / 597)
    assert summary["costs"]["letters"] == sum(len(str(n)) + 2 for n in range(300) if n not in (250, 251)) + 1
    verdicts = [json.loads(line)["verdicts"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(verdicts) == 300
    assert [each[0]["score"] for each in verdicts[8:11]] == [0.25, 0.25, 0.5]
    assert verdicts[250][0]["error"] == "KeyError: 250" and len(verdicts[251]) == 1


@pytest.mark.parametrize(
    ("reward", "options", "row", "message"),
    [
        ("exakt", "{}", {"completion": "x"}, "unknown reward 'exakt'"),
        ("exact", '{"strip": 1}', {"completion": "x"}, "strip = 1: no such option"),
        ("exact", "[]", {"completion": "x"}, "a table is needed"),
        ("exact", "{}", {"text": "x"}, "needs `completion` or `completions`"),
        ("exact", "missing.toml", {"completion": "x"}, "No such file"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tmp_path, reward, options, row, message):
    file = write(tmp_path / "a.jsonl", [row])
    done = run("score", "--reward", reward, "--options", options, file)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"a.jsonl:3: no JSON object"):
        list(read_rows([tmp_path / "a.jsonl"]))


def test_a_chat_is_its_contents():
    assert text_of([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "a\nb"


# ---- explain ---------------------------------------------------------------------------------------------------

VERDICTS = [
    Verdict(1.25, True, {"math": 1.0, "format": 0.25}, {"math: parsed": "[1/2]"}, "", [], {"judge_s": 1.5}),
    Verdict(0.0, False, error="the judge gave no rating", evidence={"judge": "hm"}),
    Verdict(0.5, False, segments=[Segment(10, 0.25), Segment(25, 0.5)]),
]


@pytest.fixture
def run_directory(tmp_path) -> Path:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.begin(version=0, step=0, num_drawn=0, in_flight=[])
    for group_id in (0, 1):
        prompt = fake_run.CountingPrompts().prompt("a", group_id)
        lease = Lease("train", group_id, 1, 0, 0, len(VERDICTS), prompt, Sampling(1.0, 8))
        ledger.leased(lease, "generator-1")
        if group_id == 0:
            ledger.arrived(msgspec.structs.replace(fake_run.result(lease), verdicts=VERDICTS))
            ledger.ended(0, "filtered", "all rewards are equal")
    ledger.close()
    return tmp_path


def test_a_group_is_explained(run_directory):
    done = run("explain", run_directory, 0)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.replace("│", " ").split())
    assert "group 0: prompt 0 of a, filtered (all rewards are equal); 3 tokens, sampled by generator-1" in told
    assert "math 1 + format 0.25 = 1.25" in told and "math: parsed: [1/2]" in told and "costs: judge_s 1.5" in told
    assert "no verdict: the judge gave no rating" in told and "judge: hm" in told
    assert "segments: 0.25 to 10, 0.5 to 25" in told


def test_a_group_without_a_result_is_explained_too(run_directory):
    done = run("explain", run_directory, 1)
    assert "group 1: prompt 1 of a, leased; no result yet" in done.stdout and "no completions" in done.stdout


def test_what_cannot_be_explained_is_one_line(run_directory, tmp_path):
    unknown = run("explain", run_directory, 7)
    assert unknown.returncode == 2 and "there is no group 7: the last is 1" in unknown.stderr
    (tmp_path / "empty").mkdir()
    empty = run("explain", tmp_path / "empty", 7)
    assert empty.returncode == 2 and not list((tmp_path / "empty").iterdir()), "it looks and makes nothing"
    nowhere = run("explain", tmp_path / "nowhere", 7)
    assert nowhere.returncode == 2 and "unable to open database file" in nowhere.stderr

"""The report of a run made by hand: which rows count, what the tables say, what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_run
import pytest

from engine import curves
from engine.curves import domains, draw, series, smooth
from engine.ledger import Ledger
from engine.report import flat, main, verdict
from engine.schema import Lease, Sampling
from engine.summary import records

PNG = b"\x89PNG\r\n"


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A row of kind step: 10 s, of them 4 waiting and 5 training."""
    return {
        "kind": "step",
        "step": number,
        "step_s": 10.0,
        "wait_s": 4.0,
        "train_s": 5.0,
        "publish_s": 0.5,
        "accuracy": 0.5,
        "accuracy/sum": 0.5,
        "reward": 0.5,
        "staleness": 1.0,
        "staleness_in_flight": 0.75,
        "staleness_in_queue": 0.25,
        "staleness_max": 2,
        "staleness_histogram": [1, 2, 1],
        "generator_idle": 0.1,
        **changes,
    }


def evaluation(name: str, first: int, last: int, **changes: Any) -> dict[str, Any]:
    figures = {"accuracy/sum": 0.25, "stderr/sum": 0.0125, "accuracy/all": 0.25, "stderr/all": None}
    row = {"kind": "evaluation", "name": name, "step": last, "first_version": first, "last_version": last}
    return row | figures | changes


def write(path: Path, rows: list[dict[str, Any]], torn: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return path


def run_of(directory: Path, rows: list[dict[str, Any]], torn: str = "") -> Path:
    """A run directory: metrics, and a ledger of three groups drawn, of which two were trained after 7 and 11 s."""
    write(directory / "metrics.jsonl", rows, torn)
    now_s = [0.0]
    ledger = Ledger(directory / "ledger.db", clock=lambda: now_s[0])
    ledger.begin(0, 0, 0, [])
    prompts = fake_run.CountingPrompts()
    leases = [Lease("train", i, 0, 0, 0, 2, prompts.prompt("a", i), Sampling(1.0, 4)) for i in range(3)]
    with ledger.transaction():
        for lease in leases:
            ledger.leased(lease, "g")
        for lease, arrival_s in zip(leases[:2], (2.0, 4.0), strict=True):
            now_s[0] = arrival_s
            ledger.arrived(fake_run.result(lease, errors=lease.group_id))
        now_s[0] = 6.0
        ledger.taken(1, [0, 1], [])
        ledger.ended(0, "trained")
        ledger.event("applied", version=0, generator="g", detail='{"stage_s": 0.5, "pause_s": 0.25}')
        ledger.event("applied", version=1, generator="g", detail='{"stage_s": 1.5, "pause_s": 0.75}')
        now_s[0] = 7.0
        ledger.ended(1, "failed", "non-finite update")
    ledger.close()
    return directory


# ---- rows ------------------------------------------------------------------------------------------------------


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    rows = records(write(tmp_path / "metrics.jsonl", [step(1), step(2)], torn='{"kind": "step", "st'))
    assert [row["step"] for row in rows] == [1, 2]


def test_resume_undoes_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    before = [step(1), step(2), evaluation("step 2", 1, 2), step(3), step(4), evaluation("step 4", 3, 4), step(5)]
    after = [step(3, reward=9.0), step(4, reward=9.0)]  # from the checkpoint of step 2; killed again at 4
    rows = records(write(tmp_path / "metrics.jsonl", [*before, *after]))
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
    ]
    assert [row.get("reward") for row in rows[-2:]] == [9.0, 9.0]


def test_evaluation_that_ends_late_undoes_nothing(tmp_path: Path) -> None:
    rows = [evaluation("before", 0, 0), step(1), step(2), step(3), evaluation("step 1", 1, 2), step(4)]
    assert len(records(write(tmp_path / "metrics.jsonl", rows))) == 6


# ---- the whole -------------------------------------------------------------------------------------------------


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [evaluation("before", 0, 0), *map(step, range(1, 5)), evaluation("step 2", 2, 4)]
    rows[3] |= {"step_s": 30.0, "wait_s": 24.0, "mismatch": 1e-6}
    run = run_of(tmp_path, rows, torn="{")
    summary = {
        "accuracy_after": 0.5,
        "wall_s": 61.25,
        "groups": {"trained": 1234},
        "domains": {"sum": {"before": None}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    assert main([str(run)]) == 0
    told = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    for expected in (
        "trained 1",
        "failed non-finite update 1",
        "leased 1",
        "a died 1",
        "sampled and scored 2 3.00 4.00",
        "waiting to be taken 2 3.00 4.00",
        "trained 2 0.50 1.00",
        "2 1.000 0.500 0.750",
        "before 0 25.0% ± 1.2% 25.0% ± -",
        "step 2 2 to 4 25.0% ± 1.2% 25.0% ± -",
        "The learner's 60 s",
        "waiting for groups 36.0 60.0%",
        "training 20.0 33.3%",
        "publishing 2.0 3.3%",
        "checkpoints, metrics 2.0 3.3%",
        "3 30.00 24.00 5.00 0.50",
        "accuracy_after 50.0%",
        "wall_s 61.2",
        "groups.trained 1,234",
        "domains.sum.before -",
    ):
        assert expected.split() in told
    assert (run / "report" / "curves.png").read_bytes().startswith(PNG)


def test_run_without_a_step_is_told_of_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, [])
    assert main([str(run), "--out", str(tmp_path / "elsewhere")]) == 0
    assert "no step was finished yet" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("missing", ["metrics.jsonl", "ledger.db"])
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    run = run_of(tmp_path, [step(1)])
    (run / missing).unlink()
    assert main([str(run)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"leeway: {run}: no run directory (it has no {missing})\n"


def test_broken_ledger_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, [step(1)])
    (run / "ledger.db").write_bytes(b"this is no database, and long enough to tell" * 100)
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == f"leeway: {run}: cannot be read: file is not a database\n"


def test_command_ends_with_its_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine.report", str(tmp_path / "none")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


# ---- parts -----------------------------------------------------------------------------------------------------


def test_bottleneck_of_the_whole_run_weighs_steps_by_their_time() -> None:
    steps = [step(1, wait_s=0.0, generator_idle=0.0), step(2, step_s=30.0, wait_s=20.0, generator_idle=0.2)]
    assert verdict(steps).startswith("idle: learner 50.0%, generators 15.0%: generation is the bottleneck")


def test_summary_is_flattened() -> None:
    nested = {"steps": 1200, "learner_idle": 0.5, "groups": {"a": {"b": 3}}, "accuracy_before": None, "wall_s": 2.55}
    assert flat(nested) == [
        ("steps", "1,200"),
        ("learner_idle", "50.0%"),
        ("groups.a.b", "3"),
        ("accuracy_before", "-"),
        ("wall_s", "2.5"),
    ]


def test_series_leaves_out_the_steps_without_the_figure() -> None:
    assert series([step(1, kl=1.0), step(2), step(3, kl=None), step(4, kl=0.0)], "kl") == ([1, 4], [1.0, 0.0])


def test_all_is_the_last_of_the_domains() -> None:
    assert domains([{"accuracy/sum": 1, "accuracy/all": 1}, {"accuracy/word": 1, "accuracy": 1}]) == [
        "sum",
        "word",
        "all",
    ]


def test_smoothing_is_a_mean_over_neighbours() -> None:
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert smooth([0.0, 3.0] * 10)[:3] == [1.5, 1.0, 2.0]


def test_panels_draw_what_is_there_and_bear_what_is_not(tmp_path: Path) -> None:
    bare = {key: value for key, value in step(1).items() if key in ("kind", "step") or key.endswith("_s")}
    draw([bare], [], "bare", tmp_path / "bare.png")
    uneven = [step(1, staleness_histogram=[]), step(2, staleness_histogram=[4]), step(3)]
    draw(uneven, [evaluation("before", 0, 0), evaluation("x", 1, 3, **{"accuracy/new": 0.5})], "r", tmp_path / "r.png")
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("bare.png", "r.png"))


def test_heat_map_holds_the_share_of_each_age() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    steps = [step(1, staleness_histogram=[3]), step(2, staleness_histogram=[1, 0, 3])]
    curves.staleness_histogram(axis, steps, [])
    (mesh, *_) = axis.collections
    shares: Any = mesh.get_array()
    assert shares.filled(0.0).tolist() == [[1.0, 0.25], [0.0, 0.0], [0.0, 0.75]]

"""The whole loop with a real SGLang server on a CPU, which is killed once while it holds leases."""

import os
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from jobs import Job
from sglang_server import OVERRIDES, ROOT

from engine.audit import audit
from engine.schema import Group, Result, Took
from engine.stream import read_tap

pytestmark = pytest.mark.slow

START_S = 400.0  # of a job: seconds, but minutes where others compute on the same cores


def leased(job: Job) -> set[int]:
    database = sqlite3.connect(f"file:{job.run.ledger}?mode=ro", uri=True)
    try:
        return {number for (number,) in database.execute("SELECT group_id FROM groups WHERE state = 'leased'")}
    finally:
        database.close()


def trained_groups(job: Job) -> dict[int, Group]:
    [tap] = job.run.stream.glob("*.tap")
    records = list(read_tap(tap))
    taken = {group_id for record in records if isinstance(record, Took) for group_id in record.group_ids}
    groups = {record.group.group_id: record.group for record in records if isinstance(record, Result)}
    return {group_id: groups[group_id] for group_id in taken}


def completions(group: Group) -> list[np.ndarray]:
    """The versions of each completion's tokens."""
    return np.split(group.versions, np.cumsum(group.lengths)[:-1])


def test_loop_with_updates_in_flight_and_a_server_killed(tmp_path: Path, warm: list[str]) -> None:
    options = [f"--{override}" for override in [*OVERRIDES, *warm]]
    config = ROOT / "configs" / "sglang_cpu.toml"
    with Job(tmp_path / f"sglang-{os.getpid()}", *options, "--run.steps=8", config=config) as job:
        job.until(lambda: job.version >= 3, "step 3", START_S)
        [generator], [server] = job.pids("generator"), job.pids("server")
        os.kill(generator, signal.SIGSTOP)
        held = leased(job)
        os.kill(server, signal.SIGKILL)
        os.kill(generator, signal.SIGCONT)
        job.until(lambda: job.version == 8, "the last step", START_S)
        assert job.succeed()["steps"] == 8
        assert "the SGLang server (pid" in job.logged("generator-0")
    report, groups = audit(job.run), trained_groups(job)
    assert report.findings == [] and report.counts["trained"] == len(groups) == 16
    assert held and held & groups.keys(), "no group of the killed server was trained"
    assert any(len(np.unique(versions)) > 1 for group in groups.values() for versions in completions(group))
    assert not any(group.kv_mixed for group in groups.values())
    assert job.records("parity")[0]["mismatch"] < 1e-4

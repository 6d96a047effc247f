"""Three hosts, one job: two learn, one generates over a slow link, and links are cut."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, hosts
from jobs import Job

from engine import checkpoint
from engine.audit import audit

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

LEASE_S, COLLECTIVE_S = 5, 60
OPTIONS = (
    "--placement.learners=2",
    "--placement.bind=0.0.0.0",
    "--weights.route=tcp",  # namespaces share memory, hosts do not
    "--generator.dtype=bfloat16",  # so that deltas travel
    "--learner.parity_bound=0.1",
    "--run.steps=1000000",
    "--evaluation.before_after=false",
    "--checkpoint.every=3",
    f"--deadlines.lease_s={LEASE_S}",
    f"--deadlines.collective_s={COLLECTIVE_S}",
    "--domains.0.reward_options={ delay_s = 0.05 }",
)


@pytest.fixture
def cluster() -> Iterator[list[Host]]:
    with hosts("leeway-a", "leeway-b", "leeway-c") as found:
        found[2].shape("100mbit")
        yield found


def launched(stack: ExitStack, cluster: list[Host], run: Path) -> list[Job]:
    """A torchrun agent of one rank on each host."""
    jobs = []
    for number, host in enumerate(cluster):
        agent = ("--nnodes=3", f"--node-rank={number}", "--rdzv-backend=static", "--master-port=29511")
        agent = (*agent, f"--master-addr={cluster[0].address}", f"--local-addr={host.address}")
        jobs.append(stack.enter_context(Job(run, *OPTIONS, ranks=1, torchrun=agent, before=host.before)))
    return jobs


def query(job: Job, text: str) -> list[Any]:
    database = sqlite3.connect(f"file:{job.run.ledger}?mode=ro", uri=True)
    try:
        return database.execute(text).fetchall()
    finally:
        database.close()


def events(job: Job, event: str) -> int:
    return query(job, f"SELECT count(*) FROM events WHERE event = '{event}'")[0][0]


def test_links_are_cut(cluster: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    run = tmp_path / f"hosts-{os.getpid()}"
    with ExitStack() as stack:
        lead, *others = launched(stack, cluster, run)
        lead.until(lambda: lead.version >= 2, "step 2", 240)
        for moment in ("published", "applied"):  # while weights travel to the generator, and while rollouts come back
            reached, joined = events(lead, moment), events(lead, "joined")
            lead.until(lambda moment=moment, reached=reached: events(lead, moment) > reached, moment)
            cluster[2].cut()
            lead.until(
                lambda: "left" in str(query(lead, "SELECT event FROM events ORDER BY number DESC LIMIT 3")), "its end"
            )
            cluster[2].mend()
            lead.until(lambda joined=joined: events(lead, "joined") > joined, "its return")
            version = lead.version
            lead.until(lambda version=version: lead.version >= version + 3, "three steps more")
        lead.until(lambda: checkpoint.latest(run), "a checkpoint")
        cluster[1].cut()
        begin = time.monotonic()
        for job in (lead, *others):
            assert job.wait(COLLECTIVE_S + 60.0) != 0
        assert time.monotonic() - begin < COLLECTIVE_S + 60.0
        for job in (lead, *others):
            job.is_gone(30.0, shared_memory=False)
    kept = checkpoint.latest(run)
    assert kept is not None
    step = checkpoint.read(kept).step
    with Job(run, *OPTIONS, "--placement.learners=1", "--placement.bind=127.0.0.1", f"--run.steps={step + 2}") as again:
        assert again.succeed()["steps"] == step + 2
    report = audit(again.run)
    assert report.findings == [] and report.counts["trained"] == 4 * (step + 2)

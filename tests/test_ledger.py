import sqlite3
from collections.abc import Iterator
from pathlib import Path

import fake_run
import msgspec
import pytest

from engine import ledger as module
from engine.config import ConfigError
from engine.ledger import Ledger, check_filesystem, filesystem
from engine.schema import Lease, Sampling
from rewards.verdict import Segment, Verdict

MOUNTS = """/dev/sda1 / ext4 rw,relatime 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/sdb1 /home/local\\040disk xfs rw 0 0
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.db", clock=lambda: 5.0)
    opened.begin(version=0, step=0, num_drawn=0, in_flight=[])
    yield opened
    opened.close()


def lease(group_id: int, attempt: int = 1, version: int = 0) -> Lease:
    prompt = fake_run.CountingPrompts().prompt("a", group_id)
    return Lease("train", group_id, attempt, version, 0, 2, prompt, Sampling(1.0, 8))


def test_a_life(ledger: Ledger, tmp_path: Path) -> None:
    ledger.leased(lease(0), "g")
    ledger.returned(0, 1, "g", "silent")
    ledger.leased(lease(0, attempt=2, version=1), "h")
    ledger.arrived(fake_run.result(lease(0, attempt=2, version=1), versions=[1, 2]))
    ledger.taken(1, [0], [])
    ledger.ended(0, "trained")
    reader = sqlite3.connect(tmp_path / "ledger.db")  # any other process may read meanwhile
    query = "SELECT state, attempt, failures, generator, lease_version, first_version, num_tokens, taken_version"
    assert reader.execute(f"{query} FROM groups").fetchall() == [("trained", 2, 1, "h", 1, 1, 4, 1)]
    judged = reader.execute("SELECT sample, length, finish, score, solved, error FROM completions").fetchall()
    assert judged == [(0, 2, "stop", 0.0, 0, ""), (1, 2, "stop", 1.0, 1, "")]
    assert reader.execute("SELECT event, generator, detail FROM events").fetchall() == [("returned", "g", "silent")]
    assert ledger.audit() == []
    assert ledger.counts() == {"trained": 1, "filtered": 0, "failed": 0, "expired": 0, "in_flight": 0, "drawn": 1}


def test_all_of_a_verdict_is_kept(ledger: Ledger, tmp_path: Path) -> None:
    verdict = Verdict(0.5, False, {"math": 0.5}, {"parsed": "7"}, "", [Segment(3, 0.25)], {"judge_s": 1.5})
    group = fake_run.result(lease(0))
    ledger.leased(lease(0), "g")
    ledger.arrived(msgspec.structs.replace(group, verdicts=[verdict] * group.num_samples))
    query = "SELECT parts, evidence, segments, costs FROM completions WHERE sample = 0"
    kept = sqlite3.connect(tmp_path / "ledger.db").execute(query).fetchone()
    assert kept == ('{"math":0.5}', '{"parsed":"7"}', "[[3,0.25]]", '{"judge_s":1.5}')


def test_a_transaction_is_whole_or_not_there(ledger: Ledger) -> None:
    with pytest.raises(KeyError), ledger.transaction():
        ledger.leased(lease(0), "g")
        raise KeyError
    assert ledger.counts()["drawn"] == 0


def test_a_resume_undoes_what_came_after_the_snapshot(ledger: Ledger) -> None:
    for group_id in range(4):
        ledger.leased(lease(group_id), "g")
    for group_id in (1, 2, 3):
        ledger.arrived(fake_run.result(lease(group_id)))
    ledger.taken(0, [3], [])
    ledger.ended(3, "trained")
    in_flight = ledger.in_flight()  # 0 leased, 1 and 2 buffered
    ledger.arrived(fake_run.result(lease(0)))
    ledger.ended(0, "filtered")
    ledger.taken(1, [1], [0])
    ledger.ended(1, "trained")
    ledger.leased(lease(4), "g")
    assert ledger.begin(version=1, step=1, num_drawn=4, in_flight=in_flight) == 1
    states = [row["state"] for row in ledger.in_flight()]
    assert states == ["pending", "buffered", "buffered"]
    assert ledger.counts() == {"trained": 1, "filtered": 0, "failed": 0, "expired": 0, "in_flight": 3, "drawn": 4}
    assert ledger.audit() == []
    events = ledger._db.execute("SELECT event, group_id, version FROM events ORDER BY number").fetchall()
    assert events == [
        ("undone takes", None, 1),
        ("undone groups", 4, None),
        ("undone groups", 0, None),
        ("undone groups", 1, None),
    ]


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("DELETE FROM groups WHERE group_id = 0", "groups missing between the first draw and the last: 0"),
        ("UPDATE groups SET state = 'lost' WHERE group_id = 1", "groups in no known state: 1"),
        ("INSERT INTO takes VALUES (9, 0, '[0]', '[]', 0)", "groups taken twice: 0"),
        ("DELETE FROM takes", "groups trained without a take: 0"),
        ("UPDATE groups SET taken_version = 7 WHERE group_id = 0", "groups of a take that know nothing of it: 0"),
        ("UPDATE groups SET ended = NULL WHERE group_id = 0", "groups in flight that have an end: 0"),
        ("DELETE FROM completions", "groups judged without completions: 0"),
        ("INSERT INTO completions (group_id, sample) VALUES (1, 0)", "completions of groups without a result: 1"),
    ],
)
def test_the_audit_finds(ledger: Ledger, damage: str, finding: str) -> None:
    ledger.leased(lease(0), "g")
    ledger.leased(lease(1), "g")
    ledger.arrived(fake_run.result(lease(0)))
    ledger.taken(0, [0], [])
    ledger.ended(0, "trained")
    assert ledger.audit() == []
    ledger._db.execute(damage)
    assert finding in ledger.audit()


def test_another_schema_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    ledger._db.execute("UPDATE meta SET value = 99 WHERE key = 'schema_version'")
    with pytest.raises(ConfigError, match="ledger of schema version 99; this engine reads"):
        Ledger(tmp_path / "ledger.db")


def test_the_file_system_is_that_of_the_deepest_mount() -> None:
    assert filesystem(Path("/var/run"), MOUNTS) == "ext4"
    assert filesystem(Path("/home/me/runs/new"), MOUNTS) == "nfs4"
    assert filesystem(Path("/home/local disk/runs"), MOUNTS) == "xfs"


def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_filesystem(tmp_path / "not" / "there")
    monkeypatch.setattr(module, "filesystem", lambda path, mounts: "nfs4")
    with pytest.raises(ConfigError, match=r"run\.directory = .*: lies on nfs4; the ledger needs a local"):
        Ledger(tmp_path / "other.db")
    assert not (tmp_path / "other.db").exists()

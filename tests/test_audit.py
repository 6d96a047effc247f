"""The audit against runs made by hand: a coordinator with its tap, no process and no model."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_run import CountingPrompts, applied, config, raw_scores, result

from engine.audit import audit, main
from engine.config import to_toml
from engine.coordinator import Coordinator
from engine.history import history, lineage
from engine.ledger import Ledger
from engine.run_directory import RunDirectory
from engine.schema import Ack, Began, Failure, Granted, Lapsed, Published, Result, Saved, Take, Took, Trained
from engine.snapshot import SNAPSHOT, digest, pack, unpack
from engine.stream import Tap, read_tap
from engine.wire import encode

SETTINGS = config(max_staleness=1, groups_per_step=2, group_size=2)


class Incarnation:
    """One start of a run, as the coordinator's loop would tape it. Group 3 is uniform, group 5 has one valid
    completion."""

    def __init__(self, run: RunDirectory, snapshot: bytes | None = None):
        self.run, self.now = run, 0.0
        run.config.write_text(to_toml(SETTINGS))
        self.ledger = Ledger(run.ledger)
        self.coordinator = Coordinator(SETTINGS, CountingPrompts(), self.ledger, raw_scores, self.record)
        self.number = self.coordinator.begin(self.now, snapshot)
        self.tap = Tap(run.stream / f"{self.number:04d}.tap")
        self.record(Began(self.number, self.coordinator.version, digest(snapshot), to_toml(SETTINGS)))
        self.coordinator.join("g", self.now)
        self.publish()

    def record(self, record: Any) -> None:
        self.tap.append(encode(record))

    def publish(self) -> None:
        version = self.coordinator.version
        self.record(Published(version, f"weights {version}"))
        self.coordinator.published(version, self.now)
        self.coordinator.applied("g", applied(version, self.number), self.now)

    def generate(self, num_groups: int) -> None:
        """Leases and finishes so many groups."""
        self.coordinator.request("g", num_groups * 2, self.now)
        for lease in self.coordinator.grants(self.now).get("g", []):
            uniform, errors = lease.group_id == 3, int(lease.group_id == 5)
            scores: Callable[[int], float] = (lambda sample: 1.0) if uniform else float
            group = result(lease, self.number, scores=scores, errors=errors)
            self.record(Result(group))
            self.coordinator.arrived(group, self.now)

    def step(self, skipped: tuple[int, ...] = ()) -> None:
        version = self.coordinator.version
        self.record(Take(2, version))
        taken = self.coordinator.take(2, version, self.now)
        assert taken is not None
        group_ids = [group.group_id for group in taken.groups]
        trained = Trained(version + 1, group_ids, "trained", skipped=[group_ids[place] for place in skipped])
        self.record(trained)
        self.coordinator.trained(trained)
        self.publish()

    def save(self) -> bytes:
        version = self.coordinator.version
        snapshot = self.coordinator.snapshot(version)
        folder = self.run.checkpoints / f"step-{version}"
        folder.mkdir(parents=True)
        (folder / SNAPSHOT).write_bytes(snapshot)
        self.record(Saved(version, digest(snapshot)))
        return snapshot

    def end(self) -> None:
        self.ledger.close()
        self.tap.close()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two versions and a checkpoint, a third one that is lost, a resume that trains it anew."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    first = Incarnation(run)
    for _ in range(2):
        first.generate(3)
        first.step()
    first.generate(1)  # in the buffer when the checkpoint is made
    first.coordinator.request("g", 2, first.now)
    first.coordinator.grants(first.now)  # and one under way
    snapshot = first.save()
    first.generate(1)
    first.step()
    first.end()
    second = Incarnation(run, snapshot)
    second.generate(2)
    second.step()
    second.end()
    return run


def test_a_sound_run_has_no_finding(run, capsys):
    report = audit(run)
    assert report.findings == []
    assert (report.version, report.num_incarnations, report.num_surviving) == (3, 2, 2)
    assert report.counts["trained"] == 6 and report.counts["filtered"] == 1 and report.counts["failed"] == 1
    assert report.counts["drawn"] == sum(report.counts.values()) - report.counts["drawn"]
    assert report.trained_tokens == 6 * 2
    assert report.max_staleness == 1
    assert main([str(run.path)]) == 0
    assert "agree" in capsys.readouterr().out


def test_groups_of_a_skipped_update_were_not_trained(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    only = Incarnation(run)
    only.generate(2)
    only.step(skipped=(1,))
    only.end()
    report = audit(run)
    assert report.findings == []
    assert (report.counts["trained"], report.counts["failed"], report.trained_tokens) == (1, 1, 2)


def test_what_a_resume_undid_is_not_history(run):
    first, second = lineage(run.stream)
    assert [record.version for record in history(first) if isinstance(record, Trained)] == [1, 2]
    assert [record.version for record in history(second) if isinstance(record, Trained)] == [3]
    assert [record.version for record in read_tap(first.path) if isinstance(record, Trained)] == [1, 2, 3]


@pytest.mark.parametrize(
    "statement, finding",
    [
        ("UPDATE groups SET state = 'filtered' WHERE group_id = 0", "group 0: its state is 'filtered' in the ledger"),
        ("UPDATE groups SET taken_version = 1 WHERE group_id = 0", "group 0: its taken_version is 1 in the ledger"),
        ("UPDATE groups SET prompt_index = 9 WHERE group_id = 1", "group 1: its prompt_index is 9 in the ledger"),
        ("DELETE FROM groups WHERE group_id = 4", "group 4: known only to the record"),
        ("UPDATE completions SET score = 0.5 WHERE group_id = 0 AND sample = 1", "completion (0, 1): its score is 0.5"),
        ("UPDATE takes SET group_ids = '[0,2]' WHERE version = 0", "take at version 0: its group_ids is '[0,2]'"),
        ("UPDATE takes SET filtered_ids = '[]'", "its filtered_ids is '[]' in the ledger, '[3]' in the record"),
    ],
)
def test_a_row_that_the_record_contradicts_is_found(run, statement, finding, capsys):
    with sqlite3.connect(run.ledger) as database:
        assert database.execute(statement).rowcount > 0
    findings = audit(run).findings
    assert any(finding in line for line in findings), findings
    assert main([str(run.path)]) == 1
    assert finding in capsys.readouterr().out


def rewrite(path: Path, change: Callable[[Any], list[Any]]) -> None:
    """The tap with every record replaced by those that `change` makes of it."""
    records = [each for record in list(read_tap(path)) for each in change(record)]
    path.unlink()
    tap = Tap(path)
    for record in records:
        tap.append(encode(record))
    tap.close()


def dropped(kind: type, **fields: Any) -> Callable[[Any], list[Any]]:
    """Leaves out the records of `kind` with these fields."""

    def change(record: Any) -> list[Any]:
        hit = isinstance(record, kind) and all(getattr(record, name) == value for name, value in fields.items())
        return [] if hit else [record]

    return change


def aged(record: Any) -> list[Any]:
    """Every group says that version 0 sampled it."""
    if not isinstance(record, Result):
        return [record]
    return [Result(msgspec.structs.replace(record.group, versions=record.group.versions * 0))]


def stretched(record: Any) -> list[Any]:
    """Group 6 says that version 0 sampled its first token."""
    if not isinstance(record, Result) or record.group.group_id != 6:
        return [record]
    versions = record.group.versions.copy()
    versions[0] = 0
    return [Result(msgspec.structs.replace(record.group, versions=versions))]


@pytest.mark.parametrize(
    "change, finding",
    [
        (dropped(Granted, group_id=2), "group 3: drawn after group 1"),
        (dropped(Ack, group_id=1), "group 1: taken, but it was leased, not buffered"),
        (dropped(Took, version=0), "version 1: made of groups [0, 1], taken were []"),
        (dropped(Trained, version=1), "version 2: trained after version 0"),
        (dropped(Published, version=1), "tokens of versions [1]"),
        (lambda record: [record] * (1 + isinstance(record, Trained)), "version 1: trained after version 1"),
        (lambda record: [record] * (1 + isinstance(record, Took)), "version 0: taken twice"),
        (aged, "group 6: tokens of versions [0], leased at 2"),
        (stretched, "group 6: tokens of versions 0 to 2 taken at 2, max_staleness is 1"),
    ],
)
def test_a_record_that_cannot_be_is_found(run, change, finding):
    rewrite(run.stream / "0000.tap", change)
    findings = audit(run).findings
    assert any(finding in line for line in findings), findings


def test_a_lease_given_up_is_a_failed_group(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    only = Incarnation(run)
    for attempt in (1, 2, 3):
        only.coordinator.request("g", 2, only.now)
        assert [lease.attempt for lease in only.coordinator.grants(only.now)["g"]] == [attempt]
        only.coordinator.failure("g", Failure("train", 0, attempt, "no room"), only.now)
    only.end()
    lapsed = [record for record in read_tap(run.stream / "0000.tap") if isinstance(record, Lapsed)]
    assert [record.given_up for record in lapsed] == [False, False, True]
    report = audit(run)
    assert report.findings == []
    assert report.counts["failed"] == 1


def test_a_checkpoint_that_says_otherwise_is_found(run):
    (path,) = run.checkpoints.glob(f"step-*/{SNAPSHOT}")
    old = path.read_bytes()
    new = pack(msgspec.structs.replace(unpack(old), num_drawn=99, filtered=[3], waiting=[]))
    path.write_bytes(new)
    assert "the checkpoint of step 2 was saved in no surviving tap" in audit(run).findings
    for tap in sorted(run.stream.iterdir()):
        rewrite(tap, lambda record: [renamed(record, digest(old), digest(new))])
    assert audit(run).findings == [
        "checkpoint of step 2: groups drawn 99, the record has 8",
        "checkpoint of step 2: groups waiting [], the record has [6]",
        "checkpoint of step 2: filtered groups [3], the record has []",
    ]


def renamed(record: Any, old: str, new: str) -> Any:
    """`record` with another name for the snapshot `old`."""
    for name in ("snapshot", "digest"):
        if getattr(record, name, None) == old:
            return msgspec.structs.replace(record, **{name: new})
    return record


def test_no_run_is_one_line_and_code_2(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err

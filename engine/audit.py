"""What became of every group, recomputed from the taps and the checkpoints, and held against the ledger row by row.

    python -m engine.audit RUN

The ledger is compared, never believed. Exit code 0: everything agrees; 1: a line for every finding; 2: no run to audit.
"""

import argparse
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from engine.config import Config, ConfigError, load
from engine.history import history, lineage
from engine.run_directory import RunDirectory
from engine.schedule import Schedule
from engine.schema import Ack, Began, End, Granted, Group, Lapsed, Published, Result, Saved, Take, Took, Trained
from engine.scores import Shape, scheduled_shape
from engine.snapshot import SNAPSHOT, Snapshot, digest, unpack

ENDS = get_args(End)
ROW = (  # of the ledger's table `groups`, and the first fields of `Fate`
    "domain",
    "prompt_index",
    "state",
    "incarnation",
    "attempt",
    "generator",
    "lease_version",
    "first_version",
    "num_tokens",
    "taken_version",
)
TAKE = ("group_ids", "filtered_ids")
COMPLETION = ("sample", "length", "finish", "score", "solved", "error")


class Fate(msgspec.Struct):
    """One group as the record knows it."""

    domain: str
    prompt_index: int
    state: str
    incarnation: int
    attempt: int
    generator: str
    lease_version: int
    first_version: int | None = None
    num_tokens: int | None = None
    taken_version: int | None = None
    newest_version: int = -1
    completions: list[tuple[Any, ...]] = []  # by `COMPLETION`

    @property
    def row(self) -> tuple[Any, ...]:
        return msgspec.structs.astuple(self)[: len(ROW)]


class Report(msgspec.Struct):
    """What an audit found: nothing, where the run is sound."""

    version: int
    counts: dict[str, int]  # groups by end, with `in_flight` and `drawn`
    num_incarnations: int
    num_surviving: int  # incarnations of which some part counts
    trained_tokens: int
    max_staleness: int
    findings: list[str]


class Account:
    """Follows the surviving history record by record. Whatever cannot follow from what went before is a finding."""

    def __init__(self, config: Config, checkpoints: dict[str, Snapshot]):
        """`checkpoints` are those on disk, by the digest of their snapshot."""
        self.fates: dict[int, Fate] = {}  # in the order of their draws
        self.takes: dict[int, tuple[list[int], list[int]]] = {}  # version -> taken, filtered since the take before
        self.version = 0
        self.trained_tokens = 0
        self.max_staleness = 0
        self.findings: list[str] = []
        self._config = config
        self._shape: Shape = scheduled_shape(config)
        self._schedule = Schedule(config)
        self._checkpoints = dict(checkpoints)
        self._incarnation = -1
        self._weights: dict[int, str] = {}  # digest of every version published
        self._prompt_index: dict[str, int] = {}  # the newest drawn, by domain
        self._results: dict[tuple[int, int], Group] = {}  # group, attempt: not yet answered
        self._buffered: set[int] = set()
        self._filtered: list[int] = []  # since the last take
        self._asked: int | None = None  # the version of the take that waits
        self._follow = {
            Began: self._on_began,
            Granted: self._on_granted,
            Lapsed: self._on_lapsed,
            Result: self._on_result,
            Ack: self._on_ack,
            Take: self._on_take,
            Took: self._on_took,
            Trained: self._on_trained,
            Published: self._on_published,
            Saved: self._on_saved,
        }

    def follow(self, record: Any) -> None:
        self._follow[type(record)](record)

    def counts(self) -> dict[str, int]:
        states = Counter(fate.state for fate in self.fates.values())
        ends = {end: states[end] for end in ENDS}
        return {**ends, "in_flight": len(self.fates) - sum(ends.values()), "drawn": len(self.fates)}

    def close(self) -> None:
        """What can only be said at the end."""
        for snapshot in self._checkpoints.values():
            self._check(False, f"the checkpoint of step {snapshot.step} was saved in no surviving tap")
        self._check(len(self.takes) - self.version in (0, 1), f"{len(self.takes)} takes made {self.version} versions")

    def _check(self, holds: bool, finding: str) -> bool:
        if not holds:
            self.findings.append(finding)
        return holds

    def _move(self, group_id: int, state: str, allowed: str) -> bool:
        """The group enters `state`, which only those in the state `allowed` may."""
        fate = self.fates.get(group_id)
        if fate is None or fate.state != allowed:
            was = "never drawn" if fate is None else fate.state
            return self._check(False, f"group {group_id}: {state}, but it was {was}, not {allowed}")
        fate.state = state
        (self._buffered.add if state == "buffered" else self._buffered.discard)(group_id)
        return True

    # ---- starts and checkpoints

    def _on_began(self, began: Began) -> None:
        self._check(
            began.base_version == self.version,
            f"incarnation {began.incarnation}: goes on from version {began.base_version}, saved was {self.version}",
        )
        self._incarnation, self._asked = began.incarnation, None
        self._results.clear()
        for group_id in self._in("leased"):
            self._move(group_id, "pending", "leased")
        for group_id in self._in("taken"):
            self._move(group_id, "buffered", "taken")
            self.fates[group_id].taken_version = None
        for version in [version for version in self.takes if version >= began.base_version]:
            self._filtered = self.takes.pop(version)[1] + self._filtered

    def _on_saved(self, saved: Saved) -> None:
        snapshot = self._checkpoints.pop(saved.digest, None)
        if snapshot is None:
            return
        name = f"checkpoint of step {saved.step}"
        seen = {
            "version": (snapshot.version, self.version),
            "groups drawn": (snapshot.num_drawn, len(self.fates)),
            "groups waiting": (
                sorted(waiting.group.group_id for waiting in snapshot.waiting),
                sorted([*self._buffered, *self._in("taken")]),
            ),
            "filtered groups": (snapshot.filtered, self._filtered_since()),
        }
        for what, (kept, recorded) in seen.items():
            self._check(kept == recorded, f"{name}: {what} {kept}, the record has {recorded}")
        rows = {row["group_id"]: tuple(row[column] for column in ROW) for row in snapshot.in_flight}
        mine = {group_id: fate.row for group_id, fate in self.fates.items() if fate.state not in ENDS}
        self.findings += differences(f"{name}: group", ROW, rows, mine)

    def _filtered_since(self) -> list[int]:
        """The groups filtered since the take that made the present version."""
        under_way = self.takes[self.version][1] if self.version in self.takes else []
        return under_way + self._filtered

    def _in(self, state: str) -> list[int]:
        return [group_id for group_id, fate in self.fates.items() if fate.state == state]

    # ---- leases and results

    def _on_granted(self, lease: Granted) -> None:
        group_id = lease.group_id
        if group_id not in self.fates:
            self._check(group_id == len(self.fates), f"group {group_id}: drawn after group {len(self.fates) - 1}")
            previous = self._prompt_index.get(lease.domain, -1)
            self._check(
                lease.prompt_index > previous,
                f"group {group_id}: prompt {lease.prompt_index} of {lease.domain} drawn after {previous}",
            )
            self._prompt_index[lease.domain] = lease.prompt_index
            self.fates[group_id] = Fate(lease.domain, lease.prompt_index, "pending", -1, 0, "", -1)
        fate = self.fates[group_id]
        place = fate.domain, fate.prompt_index
        self._check(place == (lease.domain, lease.prompt_index), f"group {group_id}: leased with another prompt")
        self._check(lease.attempt > fate.attempt, f"group {group_id}: attempt {lease.attempt} after {fate.attempt}")
        if self._move(group_id, "leased", "pending"):
            fate.incarnation, fate.attempt = self._incarnation, lease.attempt
            fate.generator, fate.lease_version = lease.generator, lease.version

    def _on_lapsed(self, lapsed: Lapsed) -> None:
        self._move(lapsed.group_id, "failed" if lapsed.given_up else "pending", "leased")

    def _on_result(self, result: Result) -> None:
        if result.group.kind == "train":
            self._results[result.group.group_id, result.group.attempt] = result.group

    def _on_ack(self, ack: Ack) -> None:
        """The answer to a result: refused with a reason, else it is the group's."""
        if ack.kind != "train":
            return
        group = self._results.pop((ack.group_id, ack.attempt), None)
        if self._check(group is not None, f"group {ack.group_id}: a result without a record") and not ack.reason:
            assert group is not None
            self._accept(group)

    def _accept(self, group: Group) -> None:
        state = self._judge(group)
        if not self._move(group.group_id, state, "leased"):
            return
        fate = self.fates[group.group_id]
        lease = fate.incarnation, fate.attempt, fate.generator, fate.lease_version
        result = group.incarnation, group.attempt, group.generator, group.lease_version
        self._check(lease == result, f"group {group.group_id}: the result of lease {result}, granted was {lease}")
        versions = set(group.versions.tolist()) or {group.lease_version}
        never = sorted(version for version in versions if version not in self._weights or version < fate.lease_version)
        self._check(not never, f"group {group.group_id}: tokens of versions {never}, leased at {fate.lease_version}")
        fate.first_version, fate.newest_version = group.first_version, max(versions)
        fate.num_tokens = len(group.token_ids)
        fate.completions = list(completions(group))
        if state == "filtered":
            self._filtered.append(group.group_id)
        self._expire()

    def _judge(self, group: Group) -> str:
        """The state that a result brings its group to."""
        valid = np.array([not verdict.error for verdict in group.verdicts])
        if valid.sum() < min(2, group.num_samples):
            return "failed"
        filters = self._schedule.at(group.lease_version).algorithm.filter_uniform
        uniform = filters and group.num_samples > 1
        return "filtered" if uniform and np.ptp(self._shape(group)[valid]) == 0 else "buffered"

    # ---- takes and versions

    def _on_take(self, take: Take) -> None:
        self._check(take.version == self.version, f"a take at version {take.version}, trained was {self.version}")
        self._asked = take.version
        self._expire()

    def _expire(self) -> None:
        """While a take waits, a group of which no token is young enough expires."""
        if self._asked is None:
            return
        oldest = self._asked - self._config.run.max_staleness
        for group_id in [group_id for group_id in self._buffered if self.fates[group_id].newest_version < oldest]:
            self._move(group_id, "expired", "buffered")

    def _on_took(self, took: Took) -> None:
        version, group_ids = took.version, took.group_ids
        self._check(version == self._asked, f"take at version {version}: the learner asked at {self._asked}")
        self._check(version not in self.takes, f"version {version}: taken twice")
        wanted = self._config.run.groups_per_step
        self._check(len(group_ids) == wanted, f"take at version {version}: {len(group_ids)} groups, not {wanted}")
        for group_id in group_ids:
            if self._move(group_id, "taken", "buffered"):
                self._check_staleness(group_id, version)
        self.takes[version] = group_ids, self._filtered
        self._filtered, self._asked = [], None

    def _check_staleness(self, group_id: int, version: int) -> None:
        """Admission promises that not even the first token is too old, so the learner has nothing to mask."""
        fate, bound = self.fates[group_id], self._config.run.max_staleness
        assert fate.first_version is not None
        fate.taken_version = version
        staleness = version - fate.first_version
        self._check(
            0 <= version - fate.newest_version and staleness <= bound,
            f"group {group_id}: tokens of versions {fate.first_version} to {fate.newest_version} taken at {version}, "
            f"max_staleness is {bound}",
        )
        self.max_staleness = max(self.max_staleness, staleness)

    def _on_trained(self, trained: Trained) -> None:
        self._check(
            trained.version == self.version + 1, f"version {trained.version}: trained after version {self.version}"
        )
        self.version = trained.version
        taken, _ = self.takes.get(trained.version - 1, ([], []))
        groups = sorted(trained.group_ids)
        self._check(groups == sorted(taken), f"version {trained.version}: made of groups {groups}, taken were {taken}")
        for group_id in trained.group_ids:
            end = trained.end_of(group_id)
            if self._move(group_id, end, "taken") and end == "trained":
                judged = self.fates[group_id].completions
                self.trained_tokens += sum(length for _, length, _, _, _, error in judged if not error)

    def _on_published(self, published: Published) -> None:
        version = published.version
        self._check(version == self.version, f"version {version}: published, trained was {self.version}")
        known = self._weights.setdefault(version, published.digest)
        self._check(known == published.digest, f"version {version}: published as {known} and as {published.digest}")


def completions(group: Group) -> Iterator[tuple[Any, ...]]:
    for sample, (length, finish, verdict) in enumerate(zip(group.lengths, group.finish, group.verdicts, strict=True)):
        yield sample, length, finish, verdict.score, int(verdict.solved), verdict.error


# ---- against the ledger ------------------------------------------------------------------------------------------


def against(ledger: Path, account: Account) -> list[str]:
    """Every row of the database that the account contradicts, or the other way round."""
    database = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)
    try:
        rows = [
            database.execute(f"SELECT {key}, {', '.join(columns)} FROM {table}").fetchall()
            for table, key, columns in (
                ("groups", "group_id", ROW),
                ("completions", "group_id", COMPLETION),
                ("takes", "version", TAKE),
            )
        ]
    finally:
        database.close()
    fates = {group_id: fate.row for group_id, fate in account.fates.items()}
    judged = {(group_id, row[0]): row for group_id, fate in account.fates.items() for row in fate.completions}
    takes = {key: tuple(msgspec.json.encode(ids).decode() for ids in take) for key, take in account.takes.items()}
    return [
        *differences("group", ROW, {key: row for key, *row in rows[0]}, fates),
        *differences("completion", COMPLETION, {(key, row[0]): row for key, *row in rows[1]}, judged),
        *differences("take at version", TAKE, {key: row for key, *row in rows[2]}, takes),
    ]


def differences(what: str, columns: tuple[str, ...], theirs: dict[Any, Any], ours: dict[Any, Any]) -> Iterator[str]:
    """A line for every key whose row the two sides tell differently; `ours` is the record's."""
    for key in sorted(theirs.keys() | ours.keys()):
        if key not in theirs or key not in ours:
            yield f"{what} {key}: known only to the {'record' if key in ours else 'ledger'}"
            continue
        for column, there, here in zip(columns, theirs[key], ours[key], strict=True):
            if there != here:
                yield f"{what} {key}: its {column} is {there!r} in the ledger, {here!r} in the record"


def audit(run: RunDirectory) -> Report:
    """Recomputes the run and compares. Raises `ConfigError` or ValueError where there is nothing to read."""
    config = load(run.config)
    snapshots = [path.read_bytes() for path in run.checkpoints.glob(f"step-*[0-9]/{SNAPSHOT}")]
    account = Account(config, {digest(data): unpack(data) for data in snapshots})
    stretches = lineage(run.stream)
    for stretch in stretches:
        for record in history(stretch):
            account.follow(record)
    account.close()
    return Report(
        version=account.version,
        counts=account.counts(),
        num_incarnations=stretches[-1].began.incarnation + 1,
        num_surviving=len(stretches),
        trained_tokens=account.trained_tokens,
        max_staleness=account.max_staleness,
        findings=[*account.findings, *against(run.ledger, account)],
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.audit", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    run = RunDirectory(parser.parse_args(argv).run)
    if not run.config.exists() or not run.ledger.exists():
        print(f"leeway: {run.path}: no run directory (config.toml and ledger.db are needed)", file=sys.stderr)
        return 2
    try:
        report = audit(run)
    except (ConfigError, ValueError) as error:
        print(f"leeway: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{number} {end}" for end, number in report.counts.items())
    print(f"{report.version} versions, {report.num_surviving} of {report.num_incarnations} incarnations; {counts}")
    print(f"{report.trained_tokens:,} tokens trained, none staler than {report.max_staleness}")
    for finding in report.findings:
        print(finding)
    print(f"{len(report.findings)} findings" if report.findings else "record, checkpoints and ledger agree")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

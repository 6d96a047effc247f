"""What became of every prompt group: a SQLite database in the run directory, written by the coordinator alone.

`groups` has a row for every group drawn, whose `state` is one of `IN_FLIGHT` or an end of `schema.End`; `completions`
the judgement of every sample; `takes` what the learner trained; `incarnations` one row for every start or resume;
`events` what is no group's present state: returned leases, refused results, published and applied versions, and,
as JSON, every row that a resume undid. Times are seconds since the epoch. Readers may query it while the job runs.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec

from engine.config import ConfigError
from engine.schema import SCHEMA_VERSION, End, Group, Lease

IN_FLIGHT = ("pending", "leased", "buffered", "taken")
ENDS: tuple[str, ...] = get_args(End)

# SQLite's write-ahead log needs memory shared by all readers, which these do not give.
NETWORK_FILESYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs ncpfs afs ceph lustre gpfs beegfs glusterfs orangefs pvfs2 davfs "
    "fuse.sshfs fuse.glusterfs fuse.ceph fuse.s3fs fuse.gcsfuse fuse.rclone fuse.juicefs fuse.mount-s3".split()
)

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS incarnations (
    incarnation INTEGER PRIMARY KEY, base_version INTEGER, base_step INTEGER, started REAL);
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY, domain TEXT, prompt_index INTEGER, state TEXT, incarnation INTEGER,
    attempt INTEGER, failures INTEGER DEFAULT 0, generator TEXT, lease_version INTEGER, first_version INTEGER,
    num_tokens INTEGER, taken_version INTEGER, reason TEXT,
    drawn REAL, leased REAL, arrived REAL, taken REAL, ended REAL);
CREATE TABLE IF NOT EXISTS completions (
    group_id INTEGER, sample INTEGER, length INTEGER, finish TEXT, score REAL, solved INTEGER, error TEXT,
    parts TEXT, evidence TEXT, segments TEXT, costs TEXT, PRIMARY KEY (group_id, sample)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS takes (
    version INTEGER PRIMARY KEY, incarnation INTEGER, group_ids TEXT, filtered_ids TEXT, taken REAL);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, time REAL, incarnation INTEGER, event TEXT, group_id INTEGER, version INTEGER,
    generator TEXT, detail TEXT);
"""

LEASED = """
INSERT INTO groups (
    group_id, domain, prompt_index, state, incarnation, attempt, generator, lease_version, drawn, leased)
VALUES (?1, ?2, ?3, 'leased', ?4, ?5, ?6, ?7, ?8, ?8)
ON CONFLICT (group_id) DO UPDATE SET state = 'leased', incarnation = ?4, attempt = ?5, generator = ?6,
    lease_version = ?7, leased = ?8"""
ARRIVED = """
UPDATE groups SET state = 'buffered', first_version = ?2, num_tokens = ?3, arrived = ?4 WHERE group_id = ?1"""
COMPLETION = "INSERT OR REPLACE INTO completions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
RETURNED = "UPDATE groups SET state = 'pending', failures = ?2 WHERE group_id = ?1"
TAKEN = "UPDATE groups SET state = 'taken', taken_version = ?2, taken = ?3 WHERE group_id = ?1"
ENDED = "UPDATE groups SET state = ?2, reason = ?3, ended = ?4 WHERE group_id = ?1"
EVENT = """
INSERT INTO events (time, incarnation, event, group_id, version, generator, detail) VALUES (?, ?, ?, ?, ?, ?, ?)"""


def filesystem(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, by the table of mounts in the form of /proc/self/mounts."""
    kinds = {}
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split(" ")
        kinds[Path(place.encode().decode("unicode_escape"))] = kind
    path = path.absolute()
    return next((kinds[place] for place in (path, *path.parents) if place in kinds), "")


def check_filesystem(directory: Path) -> None:
    """Raises `ConfigError` where `directory` (which need not exist yet) lies on a network file system."""
    table = Path("/proc/self/mounts")
    kind = filesystem(directory.resolve(), table.read_text()) if table.exists() else ""
    if kind in NETWORK_FILESYSTEMS:
        raise ConfigError(f"run.directory = {str(directory)!r}: lies on {kind}; the ledger needs a local file system")


class Ledger:
    """The database. Every method belongs to the `transaction` around it; `clock` stamps the rows."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        """Opens or makes the database. Raises `ConfigError` for another schema or an unsuitable file system."""
        check_filesystem(path.parent)
        self.incarnation = -1
        self._clock = clock
        self._db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        if self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise ConfigError(f"run.directory = {str(path.parent)!r}: its file system cannot hold a write-ahead log")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(TABLES)
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema_version', ?)", (SCHEMA_VERSION,))
        (found,) = self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        if found != SCHEMA_VERSION:
            self._db.close()
            raise ConfigError(f"{path}: ledger of schema version {found}; this engine reads {SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's writes or, where it raises, none."""
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ---- lives of groups

    def leased(self, lease: Lease, generator: str) -> None:
        """The group was leased; the first time is its draw."""
        prompt = lease.prompt
        row = (lease.group_id, prompt.domain, prompt.index, self.incarnation, lease.attempt, generator, lease.version)
        self._db.execute(LEASED, (*row, self._clock()))

    def returned(self, group_id: int, failures: int, generator: str, reason: str) -> None:
        """The lease ended without a result; the group waits for another."""
        self._db.execute(RETURNED, (group_id, failures))
        self.event("returned", group_id=group_id, generator=generator, detail=reason)

    def arrived(self, group: Group) -> None:
        """The group's result came in; it is buffered, until `ended` says otherwise."""
        self._db.execute(ARRIVED, (group.group_id, group.first_version, len(group.token_ids), self._clock()))
        self._db.executemany(COMPLETION, _completions(group))

    def taken(self, version: int, group_ids: list[int], filtered_ids: list[int]) -> None:
        """The learner took `group_ids` at `version`; `filtered_ids` were filtered since the take before."""
        now = self._clock()
        self._db.executemany(TAKEN, ((group_id, version, now) for group_id in group_ids))
        row = (version, self.incarnation, _json(group_ids), _json(filtered_ids), now)
        self._db.execute("INSERT INTO takes VALUES (?, ?, ?, ?, ?)", row)

    def ended(self, group_id: int, end: End, reason: str = "") -> None:
        self._db.execute(ENDED, (group_id, end, reason, self._clock()))

    def event(
        self, event: str, group_id: int | None = None, version: int | None = None, generator: str = "", detail: str = ""
    ) -> None:
        self._db.execute(EVENT, (self._clock(), self.incarnation, event, group_id, version, generator, detail))

    # ---- checkpoint and resume

    def sync(self) -> None:
        """Everything committed so far survives a loss of power."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def in_flight(self) -> list[dict[str, Any]]:
        """The rows of `groups` that have no end yet."""
        return self._rows(f"groups WHERE state IN ({', '.join('?' * len(IN_FLIGHT))})", IN_FLIGHT)

    def begin(self, version: int, step: int, num_drawn: int, in_flight: list[dict[str, Any]]) -> int:
        """Opens an incarnation on a snapshot and returns its number; not within a transaction.

        Everything later is undone: groups drawn since are deleted, those then `in_flight` are so again, pending or
        buffered. Rows that this removes are kept as events.
        """
        with self.transaction():
            (last,) = self._db.execute("SELECT coalesce(max(incarnation), -1) FROM incarnations").fetchone()
            self.incarnation = last + 1
            row = (self.incarnation, version, step, self._clock())
            self._db.execute("INSERT INTO incarnations VALUES (?, ?, ?, ?)", row)
            self._undo("takes", "version", self._rows("takes WHERE version >= ?", (version,)))
            self._undo("groups", "group_id", self._rows("groups WHERE group_id >= ?", (num_drawn,)))
            for row in in_flight:
                now = self._rows("groups WHERE group_id = ?", (row["group_id"],))
                self._undo("groups", "group_id", [] if now == [row] else now)
                marks = ", ".join("?" * len(row))
                self._db.execute(
                    f"INSERT OR IGNORE INTO groups ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
                )
            self._db.execute("UPDATE groups SET state = 'pending' WHERE state = 'leased'")
            self._db.execute(
                "UPDATE groups SET state = 'buffered', taken = NULL, taken_version = NULL WHERE state = 'taken'"
            )
            judged = "SELECT group_id FROM groups WHERE state != 'pending'"
            self._db.execute(f"DELETE FROM completions WHERE group_id NOT IN ({judged})")
        return self.incarnation

    def _rows(self, where: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
        cursor = self._db.execute(f"SELECT * FROM {where}", values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _undo(self, table: str, key: str, rows: list[dict[str, Any]]) -> None:
        """Deletes `rows` and keeps them as events."""
        for row in rows:
            self._db.execute(f"DELETE FROM {table} WHERE {key} = ?", (row[key],))
            self.event(f"undone {table}", row.get("group_id"), row.get("version"), detail=_json(row))

    def judged(self) -> list[dict[str, Any]]:
        """Every group in the order of the draws: its row, and of its completions how many there are (`num_samples`),
        how many of them were `judged` and how many `solved`."""
        return self._rows(
            "(SELECT groups.*, count(sample) AS num_samples, coalesce(sum(error = ''), 0) AS judged, "
            "coalesce(sum(error = '' AND solved), 0) AS solved FROM groups LEFT JOIN completions USING (group_id) "
            "GROUP BY group_id ORDER BY group_id)",
            (),
        )

    # ---- accounts

    def counts(self) -> dict[str, int]:
        """Groups by end, with `in_flight` and `drawn`."""
        states = dict(self._db.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall())
        ends = {end: states.get(end, 0) for end in ENDS}
        return {**ends, "in_flight": sum(states.get(state, 0) for state in IN_FLIGHT), "drawn": sum(states.values())}

    def audit(self) -> list[str]:
        """Every contradiction in the database, one line each; empty where conservation holds."""
        return [
            f"{finding}: {', '.join(str(row[0]) for row in rows)}"
            for finding, query in AUDIT.items()
            if (rows := self._db.execute(query).fetchmany(20))
        ]


_TOOK = "(SELECT takes.version AS taken_version, value AS group_id FROM takes, json_each(takes.group_ids))"
_KNOWN = ", ".join(f"'{state}'" for state in IN_FLIGHT + ENDS)
AUDIT = {
    "groups missing between the first draw and the last": (
        "SELECT group_id - 1 FROM groups WHERE group_id > 0 AND group_id - 1 NOT IN (SELECT group_id FROM groups)"
    ),
    "groups in no known state": f"SELECT group_id FROM groups WHERE state NOT IN ({_KNOWN})",
    "groups taken twice": f"SELECT group_id FROM {_TOOK} GROUP BY group_id HAVING count(*) > 1",
    "groups of a take that know nothing of it": (
        f"SELECT group_id FROM {_TOOK} EXCEPT SELECT group_id FROM groups JOIN {_TOOK} USING (group_id, taken_version)"
    ),
    "groups trained without a take": (
        "SELECT group_id FROM groups WHERE (state IN ('taken', 'trained') OR taken_version IS NOT NULL) "
        f"AND group_id NOT IN (SELECT group_id FROM {_TOOK})"
    ),
    "groups in flight that have an end": (
        "SELECT group_id FROM groups WHERE state IN ('pending', 'leased', 'buffered', 'taken') != (ended IS NULL)"
    ),
    "groups judged without completions": (
        "SELECT group_id FROM groups WHERE state IN ('buffered', 'taken', 'trained', 'filtered', 'expired') "
        "AND group_id NOT IN (SELECT group_id FROM completions)"
    ),
    "completions of groups without a result": (
        "SELECT DISTINCT group_id FROM completions WHERE group_id NOT IN "
        "(SELECT group_id FROM groups WHERE state NOT IN ('pending', 'leased'))"
    ),
}


def _completions(group: Group) -> Iterator[tuple[Any, ...]]:
    for sample, (length, finish, verdict) in enumerate(zip(group.lengths, group.finish, group.verdicts, strict=True)):
        details = map(_json, (verdict.parts, verdict.evidence, verdict.segments, verdict.costs))
        yield (group.group_id, sample, length, finish, verdict.score, verdict.solved, verdict.error, *details)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()

"""Two weight versions in POSIX shared memory, each in a slot guarded by a sequence number and a checksum.

File `/dev/shm/leeway-NAME`:

    0      magic, length of the manifest, rooms of payload and delta    64 + 64 i    header of slot i
    4096   manifest (JSON)      then, each on a page, two payloads, two deltas, and a table where one is attached

A slot's header is `sequence incarnation version digest base delta_bytes check`, uint64 each; the delta makes the slot's
payload out of one whose digest is `base`. The one writer makes `sequence` odd, writes payload and delta, then the
header, and makes `sequence` even again. Readers take no lock, so a reader that is killed leaves
nothing behind; a writer killed in the middle leaves its slot odd for ever and the other slot whole. A reader trusts a
slot whose header has an even sequence and a right `check`, copies it, finds the header unchanged and the copy's digest
(engine.ops.buckets) equal to `digest`. The last two also cover memory that is not seen in the order in which it was
written. Payloads may lie elsewhere (engine.weights.device): then they have no room here, and the table says where.

Other ranks of the writer `join` the segment and write their parts between its `begin` and its `commit`. The writer
holds a `flock` on the file; a segment that nobody locks was left by a dead process (`remove_stale`).
"""

import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import msgspec
import numpy as np
import xxhash

from engine.config import ConfigError
from engine.weights.manifest import Manifest, WeightsError

DIRECTORY = Path("/dev/shm")
PREFIX = "leeway-"
PIECE_BYTES = 1 << 20  # sent at a time: short enough to notice an overwrite early and to sum from the cache
NUM_SLOTS = 2

Part = Literal["payload", "delta"]

_MAGIC = b"leeway04"
_PREAMBLE = struct.Struct("<8sQQQ")
_SLOT_HEADERS_AT = 64
_SLOT_HEADER_WORDS = 8  # a cache line
_MANIFEST_AT = mmap.PAGESIZE


class Header(msgspec.Struct, frozen=True):
    """Which version a slot holds. `sequence` is even and grows with every write of the slot."""

    slot: int
    sequence: int
    incarnation: int
    version: int
    digest: int  # of the payload, 64 bits
    base: int = 0  # the digest of the payload that the delta belongs to
    delta_bytes: int = 0  # 0: there is no delta

    @property
    def age(self) -> tuple[int, int]:
        """Orders versions: a later incarnation is newer whatever its version."""
        return self.incarnation, self.version

    @property
    def check(self) -> int:
        facts = (self.sequence, self.incarnation, self.version, self.digest, self.base, self.delta_bytes)
        return xxhash.xxh3_64_intdigest(struct.pack("<6Q", *facts))


class Overwritten(Exception):
    """The slot changed while it was read."""


class Segment:
    """The mapped segment: `create` it to write, `join` it to write payload and delta of what another process created,
    `open` it to read (the mapping is then read-only)."""

    def __init__(
        self, name: str, fd: int, manifest: Manifest, rooms: tuple[int, int], *, writable: bool, owned: bool = False
    ) -> None:
        self.name = name
        self.manifest = manifest
        self.payload_room, self.delta_room = rooms  # bytes
        self._fd = fd
        self._owned = owned
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._bytes = np.frombuffer(mmap.mmap(fd, 0, prot=protection), np.uint8)
        self._payloads_at = _page_up(_MANIFEST_AT + len(manifest.encode()))
        self._deltas_at = self._payloads_at + NUM_SLOTS * _page_up(self.payload_room)
        self._table_at = self._deltas_at + NUM_SLOTS * _page_up(self.delta_room)

    @classmethod
    def create(cls, name: str, manifest: Manifest, delta_room: int = 0, *, payloads: bool = True) -> Self:
        """A new segment without a version in it, with room for deltas of so many bytes, and for payloads or not.
        Raises `ConfigError` where shared memory is too small."""
        encoded = manifest.encode()
        payload_room = manifest.num_bytes if payloads else 0
        slots = NUM_SLOTS * (_page_up(payload_room) + _page_up(delta_room))
        size = _page_up(_MANIFEST_AT + len(encoded)) + slots
        fd = _create_locked(_path(name))
        try:
            os.posix_fallocate(fd, 0, size)  # else a full /dev/shm is a SIGBUS in the middle of a publish
        except OSError as error:
            os.unlink(_path(name))
            os.close(fd)
            free = os.statvfs(DIRECTORY)
            raise ConfigError(
                f"weights: two versions need {size >> 20} MiB of {DIRECTORY}, which has "
                f"{free.f_bavail * free.f_frsize >> 20} MiB free ({error.strerror}); containers: --shm-size"
            ) from error
        os.pwrite(fd, encoded, _MANIFEST_AT)
        os.pwrite(fd, _PREAMBLE.pack(_MAGIC, len(encoded), payload_room, delta_room), 0)
        return cls(name, fd, manifest, (payload_room, delta_room), writable=True, owned=True)

    @classmethod
    def open(cls, name: str) -> Self:
        """The segment of a running job. Raises `WeightsError` where there is none of this layout."""
        return cls._existing(name, writable=False)

    @classmethod
    def join(cls, name: str) -> Self:
        """The segment that the writer's rank 0 created. Raises `WeightsError` where there is none."""
        return cls._existing(name, writable=True)

    @classmethod
    def _existing(cls, name: str, *, writable: bool) -> Self:
        try:
            fd = os.open(_path(name), os.O_RDWR if writable else os.O_RDONLY)
        except FileNotFoundError as error:
            raise WeightsError(f"there is no segment {_path(name)}: its job has ended or is on another host") from error
        preamble = os.pread(fd, _PREAMBLE.size, 0).ljust(_PREAMBLE.size, b"\0")
        magic, length, *rooms = _PREAMBLE.unpack(preamble)
        if magic != _MAGIC:
            os.close(fd)
            raise WeightsError(f"{_path(name)} is no segment of this layout: {magic!r}, expected {_MAGIC!r}")
        manifest = Manifest.decode(os.pread(fd, length, _MANIFEST_AT))
        return cls(name, fd, manifest, (rooms[0], rooms[1]), writable=writable)

    def attach(self, table: bytes) -> None:
        """Lets those see `table` who open the segment from now on."""
        os.pwrite(self._fd, table, self._table_at)

    def table(self) -> bytes:
        """What was attached, else empty."""
        return os.pread(self._fd, os.fstat(self._fd).st_size - self._table_at, self._table_at)

    def payload(self, slot: int) -> np.ndarray:
        """uint8 [payload_room], a view of the shared memory."""
        start = self._payloads_at + slot * _page_up(self.payload_room)
        return self._bytes[start : start + self.payload_room]

    def delta(self, slot: int) -> np.ndarray:
        """uint8 [delta_room], a view of the shared memory."""
        start = self._deltas_at + slot * _page_up(self.delta_room)
        return self._bytes[start : start + self.delta_room]

    def headers(self) -> list[Header]:
        """The slots that hold a whole version, newest first."""
        found = [header for header in map(self._header, range(NUM_SLOTS)) if header is not None]
        return sorted(found, key=lambda header: header.age, reverse=True)

    def view(self, header: Header, part: Part, piece: slice) -> np.ndarray:
        """Bytes of a part of `header`, which its writer may overwrite: see `check`."""
        source = self.payload(header.slot) if part == "payload" else self.delta(header.slot)[: header.delta_bytes]
        return source[piece]

    def check(self, header: Header) -> None:
        """Raises `Overwritten` if the slot no longer holds what `header` says."""
        if self._header(header.slot) != header:
            raise Overwritten

    def begin(self) -> int:
        """Opens the slot that does not hold the newest version for writing; readers see it no more."""
        whole = self.headers()
        slot = 1 - whole[0].slot if whole else 0
        self._words(slot)[0] |= np.uint64(1)
        return slot

    def withdraw(self) -> None:
        """Readers see no version any more."""
        for slot in range(NUM_SLOTS):
            self._words(slot)[0] |= np.uint64(1)

    def commit(
        self, slot: int, incarnation: int, version: int, digest: int, *, base: int = 0, delta_bytes: int = 0
    ) -> None:
        """Lets readers see the slot's payload as (incarnation, version), and the delta beside it."""
        words = self._words(slot)
        header = Header(slot, int(words[0]) + 1, incarnation, version, digest, base, delta_bytes)
        words[1:7] = (incarnation, version, digest, base, delta_bytes, header.check)
        words[0] = header.sequence

    def close(self) -> None:
        """Lets the mapping go; its creator's also removes the file, which readers that opened it may still read."""
        if self._owned:
            _path(self.name).unlink(missing_ok=True)
        os.close(self._fd)
        self._bytes = np.empty(0, np.uint8)

    def _words(self, slot: int) -> np.ndarray:
        start = _SLOT_HEADERS_AT + slot * _SLOT_HEADER_WORDS * 8
        return self._bytes[start : start + _SLOT_HEADER_WORDS * 8].view(np.uint64)

    def _header(self, slot: int) -> Header | None:
        """What the slot holds; none while it is written, or was never written."""
        *facts, check = self._words(slot)[:7].tolist()
        header = Header(slot, *facts)
        return header if header.sequence > 0 and header.sequence % 2 == 0 and check == header.check else None


def as_hex(digest: int) -> str:
    return f"{digest:016x}"


def pieces(num_bytes: int, size: int = PIECE_BYTES) -> Iterator[slice]:
    """The payload's bytes in order, `size` at a time."""
    for start in range(0, num_bytes, size):
        yield slice(start, min(start + size, num_bytes))


def remove_stale() -> list[str]:
    """Removes the segments whose writer is dead; their names. Those of other users are left alone."""
    removed = []
    for path in DIRECTORY.glob(f"{PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path.name.removeprefix(PREFIX))
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
    return removed


def host_id() -> str:
    """Names the running system: equal where processes may share memory."""
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def exists(name: str) -> bool:
    return _path(name).exists()


def _path(name: str) -> Path:
    return DIRECTORY / f"{PREFIX}{name}"


def _page_up(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _create_locked(path: Path) -> int:
    """A new file that this process holds the lock of. Raises `WeightsError` where a living process has that name."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise WeightsError(f"{path} belongs to a running job") from error
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else `remove_stale` came between the two calls above
            return fd
        os.close(fd)

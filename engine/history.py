"""The record of a run as its survivors tell it: the taps of all incarnations without what a resume undid.

An incarnation that went on from a checkpoint names it by the digest of the coordinator's part; the `Saved` record of
that digest, in an older tap, is where that tap ends to count. So the surviving history is a chain of beginnings of
taps, and the whole of the last one.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from engine.schema import Began, Saved, TapRecord
from engine.stream import read_tap


class Stretch(msgspec.Struct, frozen=True):
    """The first `num_records` records of the tap `path`, whose incarnation `began` so."""

    path: Path
    began: Began
    num_records: int


def lineage(stream: Path) -> list[Stretch]:
    """The surviving stretches in the directory `stream`, oldest first.

    A tap without a whole record is of an incarnation killed at its start. Raises ValueError where the checkpoint that
    an incarnation went on from stands in no tap.
    """
    taps = {path: began for path in sorted(stream.glob("*.tap")) if (began := next(read_tap(path), None)) is not None}
    chain: list[Stretch] = []
    for path, began in reversed(taps.items()):
        assert isinstance(began, Began), f"{path} does not start with the start of an incarnation"
        length = _until(path, chain[0].began.snapshot if chain else None)
        if length is None:
            continue
        chain.insert(0, Stretch(path, began, length))
        if not began.snapshot:
            return chain
    raise ValueError(f"{stream}: no tap holds checkpoint {chain[0].began.snapshot!r}" if chain else f"{stream}: no tap")


def _until(path: Path, snapshot: str | None) -> int | None:
    """The number of records up to the last save of `snapshot` (None: all of them); None where it never was saved."""
    length = None
    for number, record in enumerate(read_tap(path), 1):
        if snapshot is None or isinstance(record, Saved) and record.digest == snapshot:
            length = number
    return length


def history(stretch: Stretch) -> Iterator[TapRecord]:
    """The records of one stretch in their order."""
    return islice(read_tap(stretch.path), stretch.num_records)

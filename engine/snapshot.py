"""The coordinator's part of a checkpoint: cursor, frontier of the ledger, buffered groups."""

from typing import Any

import msgspec
import xxhash

from engine.buffer import Waiting
from engine.config import ConfigError
from engine.schema import SCHEMA_VERSION, Evaluation
from engine.wire import decode, encode

SNAPSHOT = "coordinator.bin"  # its file in a checkpoint


class Snapshot(msgspec.Struct, kw_only=True):
    """The coordinator at one moment; the default is a run before its first step."""

    schema_version: int = SCHEMA_VERSION
    version: int = 0
    step: int = 0
    num_drawn: int = 0
    num_surveyed: int = 0
    temperature: float | None = None  # of training, where it follows the entropy
    prompts: dict[str, Any] | None = None
    in_flight: list[dict[str, Any]] = []  # rows of the ledger
    waiting: list[Waiting] = []
    filtered: list[int] = []  # since the last take
    surveys: list[str] = []  # evaluations under way: begun again
    evaluations: list[Evaluation] = []  # finished, not yet handed out


def pack(snapshot: Snapshot) -> bytes:
    return msgspec.msgpack.encode([bytes(frame) for frame in encode(snapshot)])


def digest(data: bytes | None) -> str:
    """Names a packed snapshot: its xxh3-64, empty where there is none."""
    return "" if data is None else xxhash.xxh3_64_hexdigest(data)


def unpack(data: bytes) -> Snapshot:
    """Raises `ConfigError` for a snapshot of another schema, or no snapshot at all."""
    try:
        frames = msgspec.msgpack.decode(data, type=list[bytes])
        found = msgspec.msgpack.decode(frames[0])["schema_version"]
        if found != SCHEMA_VERSION:
            raise ConfigError(f"checkpoint: of schema version {found}; this engine reads {SCHEMA_VERSION}")
        return decode(frames, Snapshot)
    except (msgspec.MsgspecError, LookupError, TypeError) as error:
        raise ConfigError(f"checkpoint: the coordinator's part cannot be read: {error}") from error

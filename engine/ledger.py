"""What became of every prompt group: a SQLite database in the run directory."""

from pathlib import Path


class Ledger:
    def __init__(self, path: Path) -> None: ...
    def close(self) -> None: ...

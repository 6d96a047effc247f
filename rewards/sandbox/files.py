"""Files in memory, by descriptor: what goes into a sandbox, and what comes out of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed(content: bytes) -> int:
    """A file in memory with `content`, which nobody can change any more."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALED)
    return descriptor


def sink() -> int:
    """An empty file in memory, for a run to write to; the run's `file_bytes` bound it."""
    return os.memfd_create("output", os.MFD_CLOEXEC)


def content(descriptor: int, longest: int) -> bytes:
    """What stands in a file, wherever its position is."""
    return os.pread(descriptor, longest, 0)


@contextmanager
def opened(*descriptors: int) -> Iterator[tuple[int, ...]]:
    """Closes `descriptors` at the end."""
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)

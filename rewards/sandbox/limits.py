"""The bounds of one run."""

import msgspec

MIB = 1 << 20
TMP_BYTES = 64 * MIB  # the sandbox's private /tmp


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one process may use. It cannot start others, so these bounds are those of its whole tree, and of all memory
    but the kernel's own. (There an empty file in /tmp takes about a kilobyte, which `cpu_s` alone bounds: some 100 MiB
    for each of its seconds, until the sandbox is closed.)

    `memory_bytes` bounds its address space; `file_bytes` every file that it writes, its output among them; `tasks` its
    threads (with the few processes of the sandbox itself).
    """

    cpu_s: float = 4.0
    wall_s: float = 6.0
    memory_bytes: int = 1024 * MIB
    stack_bytes: int = 256 * MIB
    file_bytes: int = 16 * MIB
    open_files: int = 64
    tasks: int = 64


# What the compiler may use: it starts processes, one after the other.
COMPILER = Limits(cpu_s=20.0, wall_s=30.0, memory_bytes=2048 * MIB, stack_bytes=64 * MIB, file_bytes=64 * MIB)

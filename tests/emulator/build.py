"""Builds programs under sanitizers, with .cu files compiled for the CPU on the emulator beside this file."""

import os
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror"]
EMULATED = ["-DLEEWAY_EMULATED", "-I", str(EMULATOR), "-Wno-unknown-pragmas"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def program(sources: Iterable[Path], flags: list[str]) -> Path:
    """What `sources` make, compiled as C++ whatever they are called and linked with `flags`."""
    folder = Path(tempfile.mkdtemp(prefix="program-"))

    def compiled(numbered: tuple[int, Path]) -> Path:
        made = folder / f"{numbered[0]}-{numbered[1].stem}.o"
        subprocess.run(["g++", *FLAGS, *flags, "-x", "c++", "-c", numbered[1], "-o", made], check=True)
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, enumerate(sorted(sources))))
    subprocess.run(["g++", *flags, *objects, "-o", folder / "program"], check=True)
    return folder / "program"

"""Compiles .cu files for the CPU, on the emulator beside this file, under a sanitizer."""

import functools
import subprocess
import tempfile
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@functools.cache
def emulated(*sources: Path, sanitizer: str) -> Path:
    """The program that C++ and CUDA `sources` make together with the emulator."""
    program = Path(tempfile.mkdtemp(prefix="emulated-")) / "program"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", *SANITIZERS[sanitizer]]
    files = [*sources, EMULATOR / "emulator.cpp"]
    subprocess.run(["g++", *flags, "-I", EMULATOR, "-x", "c++", *files, "-o", program], check=True)
    return program

"""Builds the driver from its checks and the kernels, under AddressSanitizer and UBSan."""

import functools
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DRIVER = Path(__file__).resolve().parent
ROOT = DRIVER.parents[1]
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@functools.cache
def driver() -> Path:
    """The program of all checks in this folder, for the kernels of the CPU."""
    objects = Path(tempfile.mkdtemp(prefix="driver-"))

    def compiled(source: Path) -> Path:
        made = objects / "-".join(source.relative_to(ROOT).with_suffix(".o").parts)
        subprocess.run(["g++", *FLAGS, *SANITIZERS, "-c", source, "-o", made], check=True)
        return made

    sources = [*sorted(DRIVER.glob("*.cpp")), *sorted(ROOT.glob("csrc/*/cpu*.cpp"))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        linked = list(pool.map(compiled, sources))
    program = objects / "driver"
    subprocess.run(["g++", *SANITIZERS, *linked, "-o", program], check=True)
    return program

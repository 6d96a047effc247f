"""Builds the driver from its checks and the kernels, under AddressSanitizer and UBSan."""

import functools
from pathlib import Path

from emulator.build import EMULATED, EMULATOR, SANITIZERS, program

DRIVER = Path(__file__).resolve().parent
ROOT = DRIVER.parents[1]


@functools.cache
def driver() -> Path:
    """The program of all checks in this folder, for the kernels of the CPU and, emulated, for those of CUDA."""
    checks = [*DRIVER.glob("*.c*"), *ROOT.glob("csrc/*/cpu*.cpp")]
    kernels = [*ROOT.glob("csrc/*/cuda/*.cu"), EMULATOR / "emulator.cpp"]
    return program([*checks, *kernels], [*SANITIZERS["address"], *EMULATED, "-DLEEWAY_CUDA"])

"""The emulator runs what is right, and finds in each faulty kernel its fault."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
from emulator.build import EMULATED, EMULATOR, SANITIZERS, program


@functools.cache
def checks(sanitizer: str) -> Path:
    return program([EMULATOR / "checks.cu", EMULATOR / "emulator.cpp"], [*SANITIZERS[sanitizer], *EMULATED])


def check(name: str, sanitizer: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([checks(sanitizer), name], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("name", ["sum", "lanes", "limits"])
def test_right_kernels_run(name, sanitizer):
    result = check(name, sanitizer)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "sanitizer", "found"),
    [
        ("unwaited", "address", ""),  # only a wrong result: the copy had not landed
        ("missing", "address", r"sum; .* waits at __syncthreads for 1 of 64 threads"),
        ("overrun", "address", "heap-buffer-overflow"),
        ("race", "thread", "data race"),
        ("cluster-race", "thread", "data race"),
    ],
)
def test_faults_are_found(name, sanitizer, found):
    result = check(name, sanitizer)
    assert result.returncode != 0
    assert re.search(found, result.stderr), result.stderr

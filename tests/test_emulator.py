"""The emulator runs what is right, and finds in each faulty kernel its fault."""

import re
import subprocess

import pytest
from emulator.build import EMULATOR, emulated


def check(name: str, sanitizer: str) -> subprocess.CompletedProcess[str]:
    program = emulated(EMULATOR / "checks.cu", sanitizer=sanitizer)
    return subprocess.run([program, name], capture_output=True, text=True, timeout=60)


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

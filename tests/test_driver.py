"""The kernels behind their C interface, in every instruction set that this processor has, under sanitizers."""

import os
import subprocess

import pytest
from driver.build import driver


def run(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LEEWAY_ISA": isa}
    return subprocess.run([driver(), *arguments], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_all_checks_hold(isa):
    if isa not in run("--isa", isa="portable").stdout.split():
        pytest.skip(f"this processor lacks {isa}")
    result = run(isa=isa)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]


def test_an_unknown_instruction_set_is_refused():
    result = run("rows_of_every_type_and_shape", isa="mmx")
    assert result.returncode != 0
    assert "LEEWAY_ISA = mmx: must be portable, avx2 or avx512" in result.stderr

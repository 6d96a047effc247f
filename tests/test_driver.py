"""The kernels behind their C interface, in every instruction set that this processor has, under sanitizers."""

import os
import subprocess

import pytest
from driver.build import driver


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [driver(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_all_checks_hold(isa):
    if isa not in run("--isa").stdout.split():
        pytest.skip(f"this processor lacks {isa}")
    result = run("--cpu", LEEWAY_ISA=isa)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]


def test_an_unknown_instruction_set_is_refused():
    result = run("--cpu", "rows_of_every_type_and_shape", LEEWAY_ISA="mmx")
    assert result.returncode != 0
    assert "LEEWAY_ISA = mmx: must be portable, avx2 or avx512" in result.stderr


def test_all_checks_hold_on_an_emulated_cuda_device():
    result = run()
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]


ROWS = ["rows_at_once_are_their_stages", "gradients_on_cuda_overlay_the_logits"]


@pytest.mark.parametrize("sm", ["80", "90"])
def test_rows_hold_where_shared_memory_is_scarce(sm):
    """A block has some 1,700 bytes of a row: clusters on sm_90, rows read twice on sm_80."""
    result = run(*ROWS, LEEWAY_EMULATED_SM=sm, LEEWAY_EMULATED_SHARED="2300")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]

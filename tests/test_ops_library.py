"""The operators' library says what is wrong with the compiled files beside it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.ops import library

OPS = Path(library.__file__).parent


def load(directory: Path) -> subprocess.CompletedProcess[str]:
    """Loads the library as it would be with the compiled files of `directory`."""
    shutil.copy(library.__file__, directory)
    return subprocess.run([sys.executable, directory / "library.py"], capture_output=True, text=True)


def test_an_extension_that_is_not_built_is_told(tmp_path: Path):
    run = load(tmp_path)
    assert "ImportError: engine.ops._ops cannot be loaded" in run.stderr
    assert "`make install` builds it" in run.stderr


@pytest.mark.parametrize(("abi", "loads"), [("LEEWAY_ABI", True), ("LEEWAY_ABI + 1", False)])
def test_cuda_kernels_of_another_build_are_refused(tmp_path: Path, abi: str, loads: bool):
    (tmp_path / "_ops.so").symlink_to(OPS / "_ops.so")
    types = OPS.parents[1] / "csrc/api/types.h"
    (tmp_path / "cuda.c").write_text(f'#include "{types}"\nint leeway_abi(void) {{ return {abi}; }}')
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "cuda.c", "-o", tmp_path / "_cuda.so"], check=True)
    run = load(tmp_path)
    assert (run.returncode == 0) == loads
    assert loads or "differ in age" in run.stderr

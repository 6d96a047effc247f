"""Real SGLang servers for tests, of which a cold one starts in half a minute: see warm.py for the others."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import Config, load

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
STAND_INS = ROOT / "tests" / "stand_ins"
OVERRIDES = [f"generator.sglang.python={PYTHON}", f'generator.sglang.path=["{STAND_INS}"]']


def configure(*overrides: str) -> Config:
    """configs/sglang_cpu.toml, wherever the tests run."""
    return load(ROOT / "configs" / "sglang_cpu.toml", [*OVERRIDES, *overrides])


@contextmanager
def warmed() -> Iterator[list[str]]:
    """What makes a configuration's servers start in two seconds, where one process has the time to import SGLang; one
    that runs already is at LEEWAY_WARM."""
    if path := os.environ.get("LEEWAY_WARM"):
        yield overrides(path)
        return
    with tempfile.TemporaryDirectory(prefix="leeway-warm-") as folder:
        path = f"{folder}/socket"
        environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (STAND_INS, ROOT)))
        command = [str(PYTHON), str(ROOT / "tests" / "warm.py"), path]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None and process.stdout.readline() == b"warm\n"
                yield overrides(path)
            finally:
                process.kill()


def overrides(path: str) -> list[str]:
    python = ROOT / "tests" / "warm_python"
    return [f"generator.sglang.python={python}", f"generator.sglang.environment.LEEWAY_WARM={path}"]

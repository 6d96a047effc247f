"""One real SGLang server for many tests: its start takes half a minute."""

from pathlib import Path

from engine.config import Config, load

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = [
    f"generator.sglang.python={ROOT}/.venv-sglang/bin/python",
    f'generator.sglang.path=["{ROOT}/tests/stand_ins"]',
]


def configure(*overrides: str) -> Config:
    """configs/sglang_cpu.toml, wherever the tests run."""
    return load(ROOT / "configs" / "sglang_cpu.toml", [*OVERRIDES, *overrides])

"""The command line of `launch`: its arguments, the configuration that they make, and errors in one line."""

import argparse
import os
import sys
from typing import NoReturn

from engine.config import Config, ConfigError, load


class Parser(argparse.ArgumentParser):
    """Its errors are mistakes like any other: one line, told by `tell`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """`config`, `resume` and `dry_run`, and the configuration with its overrides. Raises `ConfigError`."""
    parser = Parser(
        prog="launch.py",
        usage="torchrun [its options] %(prog)s CONFIG [--table.key=value ...] [--resume RUN_DIR] [--dry-run]",
        description="Asynchronous off-policy reinforcement learning.",
        epilog="--run.seed=1, --domains.0.path=a.jsonl and the like override CONFIG; engine/config.py has every field.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, configs/tiny.toml for instance")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue a run from its last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    arguments, overrides = parser.parse_known_args(argv)
    return arguments, load(arguments.config, overrides)


def check(argv: list[str]) -> None:
    """Ends this process with code 2 where `read` raises, which rank 0 tells."""
    try:
        read(argv)
    except ConfigError as error:
        if leads():
            tell(error)
        sys.exit(2)


def leads() -> bool:
    """Whether this is the rank that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def tell(error: Exception | str) -> None:
    """One line, whatever others put into it."""
    print(f"leeway: {' '.join(str(error).splitlines())}", file=sys.stderr)

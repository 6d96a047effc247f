"""A launch that is refused: the one line that it says, and that it makes nothing."""

from pathlib import Path

from engine import launch

SMALL = Path(__file__).resolve().parent / "small.toml"


def refused(root: Path, capsys, arguments: tuple[str, ...], config: Path = SMALL) -> str:
    """The line with which a launch with these arguments, whose runs would lie below `root`, ends."""
    before = sorted(root.rglob("*"))
    capsys.readouterr()
    assert launch.main([str(config), f"--run.root={root}", *arguments]) == 2
    return check(capsys.readouterr().err, root, before)


def check(errors: str, root: Path, before: list[Path]) -> str:
    """`errors` as the one line that it must be, with nothing made below `root`."""
    assert errors.startswith("leeway: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
    assert sorted(root.rglob("*")) == before
    return errors.removeprefix("leeway: ").rstrip()

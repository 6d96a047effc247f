from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tree_names_every_module_and_nothing_that_is_gone():
    tree = README.partition("## The tree")[2].partition("## ")[0]
    listed = {word for word in tree.replace(",", " ").split() if word.endswith(".py")}
    modules = {path.name for path in (ROOT / "engine").glob("*.py")} - {"__init__.py"}
    assert listed == modules


def test_the_readme_holds_no_placeholder():
    assert "@@" not in README


def test_every_named_slot_exists_and_every_slot_is_named():
    from engine.algorithms.advantages import ADVANTAGES
    from engine.algorithms.aggregates import AGGREGATES
    from engine.algorithms.corrections import CORRECTIONS
    from engine.algorithms.divergences import DIVERGENCES
    from engine.algorithms.losses import LOSSES
    from engine.algorithms.mixtures import MIXTURES
    from engine.algorithms.penalties import PENALTIES

    tables = {
        "mixture": MIXTURES,
        "advantage": ADVANTAGES,
        "correction": CORRECTIONS,
        "loss": LOSSES,
        "aggregate": AGGREGATES,
        "kl": DIVERGENCES,
        "penalties": PENALTIES,
    }
    rows = [line.strip().strip("|").split("|") for line in README.splitlines() if line.strip().startswith("| ")]
    named = {row[0].strip(): {name.strip() for name in row[1].split(",")} for row in rows if row[0].strip() in tables}
    assert named == {slot: set(table) for slot, table in tables.items()}


def test_every_reward_is_named():
    from rewards.table import TABLE

    lines = README.partition("## Rewards")[2].partition("## ")[0].splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| ")][1:]
    assert {name.strip() for cell in cells for name in cell.split(",")} == set(TABLE)

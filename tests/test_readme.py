import textwrap
import tomllib
from pathlib import Path

import pytest

from engine.config import Config
from rewards.table import resolve

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


def test_every_module_of_the_rewards_is_named():
    tree = README.partition("    rewards/  ")[2].partition("csrc/")[0]
    words = set("".join(letter if letter.isalpha() else " " for letter in tree).split())
    modules = {path.stem for path in (ROOT / "rewards").glob("*.py")} - {"__init__"}
    assert modules <= words, modules - words


def test_no_line_but_those_of_tables_is_too_long():
    long = [line for line in README.splitlines() if len(line) > 120 and not line.lstrip().startswith("|")]
    assert not long


def test_the_reward_of_ones_own_does_what_is_said(tmp_path, monkeypatch):
    code = README.partition("In `ours.py`")[2].partition("\n\n")[2].partition("\n\n  and in")[0]
    (tmp_path / "ours.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    said = README.partition("and in the domain `")[2].partition("` Options")[0].replace("`, `", "\n").partition("`")[0]
    domain = tomllib.loads(said)
    reward = resolve(domain["reward"], domain["reward_options"])
    right = "So it is. Answer: 42"
    assert [reward("", text, "42").score for text in (right, " " * 800 + right, "Answer: 41")] == [1.0, 0.5, 0.0]
    assert reward("", right, "42").evidence == {"parsed": "42"}
    with pytest.raises(ValueError, match="^longest = 'far': Expected 'int', got 'str'$"):
        resolve(domain["reward"], {"longest": "far"})


def test_the_names_for_those_who_come_from_elsewhere_are_ours():
    rows = README.partition("| here | verl |")[2].partition("## Recipes")[0].splitlines()[2:]
    fields = [name for row in rows if row for name in row.split("|")[1].partition(";")[0].partition(":")[0].split(",")]
    fields = [name.strip() for name in fields if "." in name]
    assert len(fields) > 15
    for field in fields:
        kind = Config
        for name in field.split("."):
            kind = getattr(kind, "__args__", (kind,))[0]  # domains: a list of them
            assert name in kind.__struct_fields__, field
            kind = kind.__annotations__[name] if name in kind.__annotations__ else kind.__base__.__annotations__[name]

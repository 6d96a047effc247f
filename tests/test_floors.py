"""The floors of the house, drawn from the source: imports point down, or sideways without a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom. A package stands for all its modules; nothing imports the first floor.
FLOORS = [
    {"engine.launch", "engine.report", "engine.audit", "engine.replay"},
    {"engine.learner_loop", "engine.actor_loop", "engine.coordinator_loop"},
    {
        "engine.coordinator",
        "engine.snapshot",
        "engine.checkpoint",
        "engine.warm_start",
        "engine.rollouts",
        "engine.stages",
        "engine.plan",
    },
    {
        "engine.prompts",
        "engine.draws",
        "engine.leases",
        "engine.tally",
        "engine.sources",
        "engine.task",
        "engine.tokenizer",
        "engine.tickets",
        "engine.roster",
        "engine.ledger",
        "engine.run_directory",
        "engine.generators",
        "engine.scorer",
        "engine.stream",
        "engine.history",
        "engine.buffer",
        "engine.evaluation",
        "engine.credit",
        "engine.scores",
        "engine.packer",
        "engine.learner",
        "engine.critic",
        "engine.policy",
        "engine.weights",
        "engine.metrics",
        "engine.summary",
        "engine.curves",
        "engine.progress",
        "engine.placement",
    },
    {
        "engine.blocks",
        "engine.model",
        "engine.fusion",
        "engine.head",
        "engine.attention",
        "engine.parallel",
        "engine.optimizer",
        "engine.algorithms",
        "engine.ops",
    },
    {
        "engine.schema",
        "engine.wire",
        "engine.keys",
        "engine.config",
        "engine.command",
        "engine.schedule",
        "engine.process",
        "engine.origin",
        "engine.rules",
    },
    {"rewards"},
]

TORCH_FREE = {
    "engine.metrics",
    "engine.summary",
    "engine.curves",
    "engine.progress",
    "engine.report",
    "engine.scores",
    "engine.command",
    "engine.config",
    "engine.rules",
    "engine.schedule",
    "engine.stages",
    "engine.schema",
    "engine.wire",
    "engine.prompts",
    "engine.draws",
    "engine.leases",
    "engine.sources",
    "engine.tally",
    "engine.tokenizer",
    "engine.tickets",
    "engine.roster",
    "engine.ledger",
    "engine.run_directory",
    "engine.stream",
    "engine.history",
    "engine.audit",
    "engine.buffer",
    "engine.evaluation",
    "engine.coordinator",
    "engine.scorer",
    "engine.packer",
    "engine.ops",
    "engine.algorithms.penalties",
    "engine.algorithms.mixtures",
    "engine.process",
    "rewards",
}
# What engine.ops leaves to be imported by who has torch.
OPERATORS = {
    "engine.ops.buckets",
    "engine.ops.library",
    "engine.ops.loss",
    "engine.ops.model",
    "engine.ops.packing",
    "engine.ops.reference",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): ast.parse(path.read_text())
    for package in ("engine", "rewards")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules that the import statements among `nodes` name; `from a import b` is a.b where that is a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES else node.module


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function's body, nothing for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_module_level(child)


def within(module: str, packages: set[str]) -> bool:
    return any(module == each or module.startswith(each + ".") for each in packages)


def floor(module: str) -> int:
    (number,) = (i for i, modules in enumerate(FLOORS) if within(module, modules))
    return number


def internal(module: str) -> set[str]:
    """The project's modules that `module` imports anywhere, also inside functions."""
    return {name for name in imports(ast.walk(SOURCES[module])) if name in SOURCES and name != module}


def loaded(module: str, seen: set[str]) -> set[str]:
    """Everything that importing `module` imports, directly or not, its parent packages included."""
    parts = module.split(".")
    for name in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
        if name not in seen:
            seen.add(name)
            for each in imports(at_module_level(SOURCES[name])) if name in SOURCES else ():
                loaded(each, seen)
    return seen


def test_every_module_stands_on_one_floor():
    homeless = [m for m in SOURCES if m != "engine" and sum(within(m, modules) for modules in FLOORS) != 1]
    assert not homeless, f"give each a place in FLOORS: {homeless}"
    gone = [name for modules in FLOORS for name in sorted(modules) if name not in SOURCES]
    assert not gone, f"in FLOORS, but no module: {gone}"


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "engine"])
def test_imports_point_down(module):
    upward = [name for name in internal(module) if name != "engine" and floor(name) < floor(module)]
    assert not upward, f"{module} imports from a floor above it: {upward}"
    assert floor(module) == 0 or not [name for name in internal(module) if floor(name) == 0]


def test_no_import_is_circular():
    try:
        TopologicalSorter({module: internal(module) for module in SOURCES}).prepare()
    except CycleError as error:
        pytest.fail(f"circular import: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", [m for m in SOURCES if within(m, TORCH_FREE) and m not in OPERATORS])
def test_no_torch_is_loaded_with(module):
    heavy = sorted({name for name in loaded(module, set()) if name in ("torch", "transformers")})
    assert not heavy, f"importing {module} imports {heavy}"


@pytest.mark.parametrize("module", [module for module in SOURCES if within(module, {"rewards"})])
def test_rewards_know_nothing_of_the_engine(module):
    assert not [name for name in imports(ast.walk(SOURCES[module])) if within(name, {"engine"})]

"""docs/development/architecture.md, checked on the source text: who imports whom, private names, short doors.

Each rule is a function from the sources to its faults. It must find none here, and the one in a small broken tree.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
PACKAGE = "ijepa_transformers"
MODEL_IMPORT = "from .configuration_ijepa import IJepaConfig"
LONGEST_DOOR = 25
DOORS = ("run_*.py", "conversion/*.py", "modeling_ijepa.py", "configuration_ijepa.py")
PLACES = (*DOORS, f"{PACKAGE}/**/*.py", "benchmarks/**/*.py", "examples/**/*.py", "tests/**/*.py")
Sources = dict[str, ast.Module]  # by dotted name, such as "ijepa_transformers.data.__init__"
Imports = dict[str, list[tuple[ast.stmt, str, str]]]  # by dotted name: (statement, module of ours, imported name)


def read_sources(root: Path) -> Sources:
    paths = sorted(path for place in PLACES for path in root.glob(place))
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, paths, strict=True)}


def import_table(drawing: str) -> dict[str, list[str]]:
    """The block below "Who may import whom": lines `importers -> imported`, and `group = names`."""
    groups: dict[str, list[str]] = {}
    table: dict[str, list[str]] = {}
    for line in filter(None, drawing.split("## Who may import whom")[1].split("```")[1].splitlines()):
        left, right = line.replace("=", "->").split("->")
        names = [part.strip() for part in right.split(",") if part.strip()]
        names = [name for part in names for name in groups.get(part, [part])]
        if "=" in line:
            groups[left.strip()] = names
        else:
            table |= {importer.strip(): names for importer in left.split(",")}
    return table


def find_imports(sources: Sources) -> Imports:
    """All that a module imports from ours, inside functions too."""
    return {name: list(dict.fromkeys(imports_of(name, tree, sources))) for name, tree in sources.items()}


def imports_of(name: str, tree: ast.Module, sources: Sources) -> Iterator[tuple[ast.stmt, str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, imported in found:
            candidates = (f"{base}.{imported}", f"{base}.{imported}.__init__", base, f"{base}.__init__")
            module = next((candidate for candidate in candidates if candidate in sources), None)
            if module:
                yield node, module, imported


def where(name: str, node: ast.AST) -> str:
    return f"{name}:{getattr(node, 'lineno', 0)}"


def forbidden_imports(imports: Imports, table: dict[str, list[str]]) -> Iterator[str]:
    for name, found in imports.items():
        in_package = name.startswith(f"{PACKAGE}.")
        allowed = [PACKAGE, name.split(".")[0], "benchmarks", "examples"]
        if in_package:
            room = name.split(".")[1]
            allowed = [f"{PACKAGE}.{entry}" for entry in (room, *table.get(room, []))]
        for node, module, _ in found if not name.startswith("tests.") else []:
            if not any(f"{module}.".startswith(f"{entry}.") for entry in allowed):
                yield f"{where(name, node)} imports {module}"


def unlisted_modules(sources: Sources, table: dict[str, list[str]]) -> Iterator[str]:
    names = {name.split(".")[1] for name in sources if name.startswith(f"{PACKAGE}.")}
    return (f"{name} is not in the import table" for name in sorted(names - set(table)))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_definitions(nodes: list[ast.AST]) -> set[str]:
    """Private names that a module defines: functions, classes, variables, and attributes that it sets."""
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return {name for name in names if is_private(name)}


def private_reads(sources: Sources, imports: Imports) -> Iterator[str]:
    """Private names of another module that are imported, or read as `x._name` where the module has none of its own."""
    nodes = {name: list(ast.walk(tree)) for name, tree in sources.items() if not name.startswith("tests.")}
    defined = {name: private_definitions(nodes[name]) for name in nodes}
    for name in nodes:
        for node, module, imported in imports[name]:
            if is_private(imported):
                yield f"{where(name, node)} imports {imported} of {module}"
        others = set().union(*(names for other, names in defined.items() if other != name)) - defined[name]
        for node in nodes[name]:
            if isinstance(node, ast.Attribute) and node.attr in others:
                yield f"{where(name, node)} reads {node.attr} of another module"


def long_doors(root: Path) -> Iterator[str]:
    for path in sorted(path for place in DOORS for path in root.glob(place)):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_DOOR:
            yield f"{path.name} has {lines} lines"


def imported_tests(imports: Imports) -> Iterator[str]:
    for name, found in imports.items():
        for node, module, _ in found:
            if module.split(".")[-1].startswith("test_"):
                yield f"{where(name, node)} imports {module}"


def imports_of_the_model(imports: Imports) -> Iterator[str]:
    name = f"{PACKAGE}.modeling_ijepa"
    statements = dict.fromkeys(node for node, _, _ in imports[name])
    return (f"{where(name, node)}: {ast.unparse(node)}" for node in statements if ast.unparse(node) != MODEL_IMPORT)


def all_faults(root: Path) -> list[str]:
    sources = read_sources(root)
    imports = find_imports(sources)
    table = import_table((root / "docs" / "development" / "architecture.md").read_text(encoding="utf-8"))
    by_table = [*forbidden_imports(imports, table), *unlisted_modules(sources, table)]
    by_name = [*private_reads(sources, imports), *imported_tests(imports), *imports_of_the_model(imports)]
    return [*by_table, *by_name, *long_doors(root)]


def test_the_tree_follows_the_drawing():
    assert all_faults(REPOSITORY) == []


TABLE = """
low = files, configuration_ijepa

files, configuration_ijepa ->
data                       -> low
modeling_ijepa             -> configuration_ijepa
pretraining                -> low, data.order
"""
SOUND = {
    "docs/development/architecture.md": f"# Drawing\n## Who may import whom\n```\n{TABLE}```\n",
    "run_a.py": "from ijepa_transformers.pretraining.command import main\n",
    "benchmarks/speed.py": "from ijepa_transformers import files\n",
    "tests/__init__.py": "",
    "tests/test_a.py": "from tests import runs\n",
    "tests/runs.py": "import run_a\n",
    f"{PACKAGE}/files.py": "class Lock:\n    _held = 1\n\ndef _sync(): ...\n",
    f"{PACKAGE}/configuration_ijepa.py": "class IJepaConfig: ...\n",
    f"{PACKAGE}/modeling_ijepa.py": f"import torch\n{MODEL_IMPORT}\n",
    f"{PACKAGE}/data/__init__.py": "",
    f"{PACKAGE}/data/order.py": "from ..files import Lock\n",
    f"{PACKAGE}/data/sources.py": "from .order import Lock\n",
    f"{PACKAGE}/pretraining/command.py": "from ..data import order\nfrom ..data.order import Lock\n_own = Lock._own\n",
}
BROKEN = {
    "a room above": (f"{PACKAGE}/files.py", "from .data import order\n", "files:1 imports ijepa_transformers.data"),
    "in a function": (
        f"{PACKAGE}/files.py",
        "def f():\n    import ijepa_transformers.data.order\n",
        "files:2 imports",
    ),
    "half a room": (f"{PACKAGE}/pretraining/command.py", "from ..data import sources\n", "command:1 imports"),
    "a door": (f"{PACKAGE}/pretraining/command.py", "import run_a\n", "command:1 imports run_a"),
    "a test helper": ("benchmarks/speed.py", "from tests import runs\n", "speed:1 imports tests.runs"),
    "unlisted": (f"{PACKAGE}/new.py", "", "new is not in the import table"),
    "private import": ("benchmarks/speed.py", "from ijepa_transformers.files import _sync\n", "imports _sync of"),
    "private of a module": (
        f"{PACKAGE}/data/order.py",
        "from .. import files\nfiles._sync()\n",
        "reads _sync",
    ),
    "private of an object": (
        f"{PACKAGE}/data/order.py",
        "def f(lock):\n    return lock._held\n",
        "reads _held",
    ),
    "long door": ("run_a.py", "#\n" * (LONGEST_DOOR + 1), "run_a.py has 26 lines"),
    "long converter": ("conversion/a.py", "#\n" * (LONGEST_DOOR + 1), "a.py has 26 lines"),
    "test imports test": ("tests/test_b.py", "from tests.test_a import runs\n", "test_b:1 imports tests.test_a"),
    "helper imports test": ("tests/runs.py", "from tests import test_a\n", "runs:1 imports tests.test_a"),
    "model, another name": (f"{PACKAGE}/modeling_ijepa.py", f"{MODEL_IMPORT}, SIZES\n", "modeling_ijepa:1: from"),
    "model, another form": (
        f"{PACKAGE}/modeling_ijepa.py",
        "from ijepa_transformers.configuration_ijepa import IJepaConfig\n",
        "modeling_ijepa:1: from ijepa_transformers",
    ),
}


@pytest.mark.parametrize("case", [None, *BROKEN])
def test_each_rule_finds_its_fault_and_no_other(tmp_path, case):
    path, text, expected = BROKEN.get(case, ("run_a.py", "", None))
    for name, content in {**SOUND, path: text}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    faults = all_faults(tmp_path)
    assert len(faults) == (expected is not None), faults
    assert expected is None or expected in faults[0]

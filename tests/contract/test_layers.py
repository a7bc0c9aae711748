"""Imports run one way: root <- methods, composition <- commands <- bridge, cpu <- testing; verl stays in the bridge."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import verl_plugins

PACKAGE = Path(verl_plugins.__file__).parent
FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if "template" not in file.parts)
METHODS = ("advantage", "reward", "sampling", "entropy", "optim", "distill", "diagnostics", "labs")
ROOT = {"__init__", "hookspecs", "plugin", "batch", "selecting", "fields", "tokens", "groups", "services", "replay"}
ROOT |= {"distilled", "errors", "hidden", "lab", "values"}
ADDRESSES = {"cli", "__main__"}
"""`python -m verl_plugins` and `python -m verl_plugins.cli`, which only point at the command."""
FOREIGN = ("verl", "ray", "transfer_queue", "vllm")
MAY_IMPORT = {
    "root": {"root"},
    "methods": {"root", "methods"},
    "data": {"root", "methods", "data"},
    "composition": {"root", "composition", "data"},
    "commands": {"root", "composition", "commands", "data"},
    "bridge": {"root", "methods", "composition", "commands", "bridge", "cpu"},
    "cpu": {"root", "composition", "commands", "bridge", "cpu"},
    "testing": {"root", "methods", "composition", "bridge", "testing"},
}


def layer(module: tuple[str, ...]) -> str:
    """The layer of a module of this package, named by its parts after `verl_plugins`."""
    first = module[0] if module else "__init__"
    if first in METHODS:
        return "methods"
    return first if first in MAY_IMPORT else "root"


def imported(file: Path) -> Iterator[str]:
    """All modules a file imports, wherever it does, but not those that only type checkers read."""
    tree = ast.parse((PACKAGE / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            of_package = (PACKAGE.parent / Path(*(node.module or "").split("."))).is_dir()
            yield from (f"{node.module}.{alias.name}" if of_package else node.module or "" for alias in node.names)


def own(names: Iterator[str]) -> Iterator[tuple[str, ...]]:
    """Modules of this package among them, as the parts of their names."""
    for name in names:
        parts = tuple(name.split("."))
        if parts[0] == "verl_plugins":
            inside = parts[1:]
            while inside and not any((PACKAGE.joinpath(*inside).with_suffix(s)).exists() for s in ("", ".py")):
                inside = inside[:-1]
            yield inside


def test_the_root_holds_what_an_author_reads() -> None:
    assert {file.stem for file in FILES if len(file.parts) == 1} == ROOT | ADDRESSES


@pytest.mark.parametrize("file", [file for file in FILES if file.stem not in ADDRESSES], ids=str)
def test_imports_run_one_way(file: Path) -> None:
    here = layer(file.with_suffix("").parts)
    wrong = [".".join(module) for module in own(imported(file)) if layer(module) not in MAY_IMPORT[here]]
    assert not wrong


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] in METHODS], ids=str)
def test_a_method_imports_its_own_family_and_rewards_only(file: Path) -> None:
    """A lab may import the method whose claim it measures, no other lab."""
    families = {module[0] for module in own(imported(file)) if module and module[0] in METHODS}
    allowed = {*METHODS} - {"labs"} if file.parts[0] == "labs" else {file.parts[0], "reward"}
    assert families <= allowed


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] not in ("bridge", "cpu")], ids=str)
def test_outside_bridge_and_cpu_nothing_imports_verl(file: Path) -> None:
    assert not [name for name in imported(file) if name.split(".")[0] in FOREIGN]


def test_no_file_imports_itself_in_a_circle() -> None:
    """Within bridge and cpu, too, one can be read before the other."""
    arrows = {file.with_suffix("").parts: set(own(imported(file))) for file in FILES}
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], path: tuple[tuple[str, ...], ...]) -> None:
        assert module not in path, " -> ".join(".".join(part) for part in (*path, module))
        if module in done:
            return
        for target in arrows.get(module, ()):
            if target != module:
                visit(target, (*path, module))
        done.add(module)

    for module in arrows:
        visit(module, ())


@pytest.mark.parametrize("words", [["list"], ["show", "vade"]], ids=" ".join)
def test_what_list_and_show_need_imports_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom verl_plugins.commands.cli import app\n"
        f"try:\n    app({words})\nexcept SystemExit:\n    pass\n"
        "print('heavy:', *{'torch', 'transformers', 'verl', 'ray', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"

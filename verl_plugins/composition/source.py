"""A plugin class, or the settings of a lab, as the source file says them, without executing the module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Field = tuple[str, str, Any, dict[str, Any]]
"""Name, annotation, default (MISSING when there is none) and what `setting` says of it."""


class NotLiteral(Exception):
    """The source says something that only executing it can tell."""


def class_source(path: Path, name: str) -> ClassSource:
    """The class `name` of the file; NotLiteral when it is imported from elsewhere, LookupError when there is none."""
    module = _parsed(path, path.stat().st_mtime_ns)
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ClassSource(module, node)
    imported = {alias.asname or alias.name for node in module.body for alias in getattr(node, "names", [])}
    if name in imported:
        raise NotLiteral(f"{name} comes from another module")
    raise LookupError(f"{path.name} has no class {name}")


@lru_cache(maxsize=128)
def _parsed(path: Path, changed: int) -> ast.Module:
    """The tree of a file as it was at the time `changed`; a composition looks at each plugin several times."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=path.name)


def fields_of_parameter(path: Path, function: str, parameter: str) -> list[Field]:
    """Fields of the dataclass that annotates a parameter of the function; NotLiteral where only importing can tell."""
    source = Source(ast.parse(path.read_text(encoding="utf-8"), filename=path.name))
    named = {node.name: node for node in source.module.body if hasattr(node, "name")}
    found = getattr(named.get(function), "args", None)
    hints = {arg.arg: _last_name(arg.annotation) for arg in found.args if arg.annotation} if found else {}
    node = named.get(hints.get(parameter, ""))
    if not isinstance(node, ast.ClassDef) or node.bases:
        raise NotLiteral(f"{parameter} of {function} is no class of the module")
    return list(source.fields(node))


@dataclass(frozen=True)
class Source:
    """The syntax tree of a module."""

    module: ast.Module

    def fields(self, node: ast.ClassDef) -> Iterator[Field]:
        """Those of a dataclass."""
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                yield item.target.id, ast.unparse(item.annotation), *self._default(item.value)

    def _default(self, node: ast.expr | None) -> tuple[Any, dict[str, Any]]:
        if node is None:
            return MISSING, {}
        if not (isinstance(node, ast.Call) and _last_name(node) == "setting"):
            return self._value(node), {}
        given = self._keywords(node)
        given.update(zip(("default", "doc"), map(self._value, node.args), strict=False))
        return given.pop("default", MISSING), given

    def _keywords(self, node: ast.expr) -> dict[str, Any]:
        keywords = node.keywords if isinstance(node, ast.Call) else []
        return {keyword.arg: self._value(keyword.value) for keyword in keywords if keyword.arg}

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in self._constants:
            node = self._constants[node.id]
        if isinstance(node, ast.Call) and _last_name(node) == "frozenset":
            return frozenset(self._value(node.args[0]) if node.args else ())
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise NotLiteral(ast.unparse(node)) from None

    @cached_property
    def _constants(self) -> dict[str, ast.expr]:
        return dict(_assignments(self.module.body))


@dataclass(frozen=True)
class ClassSource(Source):
    """A plugin class in the syntax tree of its module."""

    node: ast.ClassDef

    def __post_init__(self) -> None:
        if [_last_name(base) for base in self.node.bases] != ["Plugin"]:
            raise NotLiteral(f"{self.node.name} inherits from more than Plugin")

    @property
    def doc(self) -> str:
        """Docstring of the module, else of the class."""
        return ast.get_docstring(self.module) or ast.get_docstring(self.node) or ""

    def attributes(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of the class attributes that are assigned."""
        return {name: self._value(node) for name, node in _assignments(self.node.body) if name in names}

    def hooks(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(stage, options of its hookimpl) of each implementation."""
        for node in self.node.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for decorator in node.decorator_list:
                    if _last_name(decorator) == "hookimpl":
                        options = self._keywords(decorator)
                        yield options.get("specname") or node.name, options

    def settings(self) -> Iterator[Field]:
        """Fields of Config."""
        config = self._config()
        return self.fields(config) if config else iter(())

    def _config(self) -> ast.ClassDef | None:
        found = [node for node in self.node.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
        if found and found[0].bases:
            raise NotLiteral("Config inherits from another class")
        if not found and "Config" in dict(_assignments(self.node.body)):
            raise NotLiteral("Config is made elsewhere")
        return found[0] if found else None


def missing_import(module: ast.Module) -> str:
    """Why importing the module must fail: the first top-level package it imports that is not installed, or ''."""
    for node in module.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in names:
            package = name.split(".")[0]
            if find_spec(package) is None:
                return f"ModuleNotFoundError: No module named {package!r}"
    return ""


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of `a = 1`, `a, b = 1, 2` and `a: int = 1`."""
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    names = [item.id for item in target.elts if isinstance(item, ast.Name)]
                    yield from zip(names, node.value.elts, strict=False)


def _last_name(node: ast.expr) -> str:
    """`hookimpl` of `hookimpl`, `verl_plugins.hookimpl` and `hookimpl(…)`."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")

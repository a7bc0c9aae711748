"""Which code a process has: a digest of this package and of each plugin, to compare between processes and nodes."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from verl_plugins.composition import manifest
from verl_plugins.errors import CompositionError

PACKAGE = "verl-plugins"
MISSING = "missing"


@dataclass(frozen=True)
class Identity:
    """What one process of a run has installed."""

    role: str
    node: str
    pid: int
    digests: dict[str, str]
    """`verl-plugins` and each plugin -> distribution version and the first digits of a hash over its source files."""

    def __str__(self) -> str:
        found = ", ".join(f"{name} {digest}" for name, digest in self.digests.items())
        return f"{self.role} (node {self.node}, process {self.pid}) has {found}"


def identify(plugins: Iterable[str], role: str) -> Identity:
    """This process's view of the named plugins; one that is not installed, or broken, counts as missing."""
    digests = {PACKAGE: f"{version(PACKAGE)} {_hash(tuple(sorted(Path(__file__).parents[1].rglob('*.py'))))}"}
    installed = manifest.entries()
    digests |= {name: _digest(name, installed) for name in sorted(set(plugins))}
    return Identity(role, platform.node(), os.getpid(), digests)


def difference(expected: Mapping[str, str], own: Identity) -> str | None:
    """One sentence on the first digest that is not the driver's, or None."""
    for name in sorted(expected.keys() | own.digests.keys()):
        theirs, ours = expected.get(name, MISSING), own.digests.get(name, MISSING)
        if theirs != ours:
            what = "package" if name == PACKAGE else "plugin"
            return (
                f"node {own.node}: {what} {name!r} of the {own.role} is {ours}, the driver's is {theirs}; "
                "install the same packages on every node"
            )
    return None


def _digest(name: str, installed: list) -> str:
    try:
        plugin = manifest.find(name, installed)
        return f"{plugin.distribution_version} {_hash(_files(plugin.target))}"
    except (CompositionError, OSError):
        return MISSING


def _files(target: str) -> tuple[Path, ...]:
    """The plugin's module, with the modules beside it when it lies in a package."""
    module = target.partition(":")[0]
    file = manifest.locate(module)
    return tuple(sorted(file.parent.glob("*.py"))) if "." in module else (file,)


@lru_cache
def _hash(files: tuple[Path, ...]) -> str:
    whole = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        whole.update(f"{file.name} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:12]

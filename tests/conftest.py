"""Throw-away distributions: what a third party installs, made in a temporary folder."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PLUGIN = '''
"""{idea}"""
from dataclasses import dataclass
from verl_plugins import Plugin, hookimpl, setting

class Method(Plugin):
    name = "{name}"
{body}
'''


class Site:
    """A folder on the import path, in this process and in those it starts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, file: str, text: str) -> Path:
        """A file of the folder, dedented."""
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def distribution(self, name: str, version: str = "1.0", **entries: str) -> None:
        """Metadata with entry points of the group `verl_plugins`."""
        folder = f"{name.replace('-', '_')}-{version}.dist-info"
        self.write(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{entry} = {value}" for entry, value in entries.items()]
        self.write(f"{folder}/entry_points.txt", "\n".join(["[verl_plugins]", *lines, ""]))

    def plugin(self, name: str, body: str = "", *, distribution: str = "acme", idea: str = "An idea.") -> None:
        """A distribution with one plugin; `body` is the inside of its class."""
        module = f"{distribution}_{name}".replace("-", "_")
        inside = textwrap.indent(textwrap.dedent(body), "    ")
        (self.path / f"{module}.py").write_text(PLUGIN.format(idea=idea, name=name, body=inside))
        self.distribution(distribution, **{name: f"{module}:Method"})

    def recipes(self, distribution: str, **files: str) -> Path:
        """A distribution with a folder of recipes; a name `presets__x` is the preset x."""
        module = f"{distribution}_recipes".replace("-", "_")
        for name, text in files.items():
            self.write(f"{module}_files/{name.replace('__', '/')}.yaml", text)
        self.write(f"{module}.py", f"from pathlib import Path\nRECIPES = Path(__file__).parent / '{module}_files'\n")
        self.distribution(distribution, recipes=f"{module}:RECIPES")
        return self.path / f"{module}_files"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty folder on the import path; modules imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def sentence() -> Callable[..., None]:
    """Asserts that a message is one line, one sentence, and names what it must."""

    def check(message: object, *parts: str) -> None:
        text = str(message)
        assert "\n" not in text
        assert not text.rstrip().endswith(".")
        assert ". " not in text
        for part in parts:
            assert part in text, f"{part!r} is not in: {text}"

    return check

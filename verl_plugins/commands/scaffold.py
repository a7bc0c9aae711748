"""`verl-plugins new`: a package of one plugin and one recipe, written from the template of a stage.

A template is such a package itself, of a plugin `my_method` on the stage `the_stage`; all forms of that name, and the
stage, are replaced. What does not depend on the stage lies in `template/common`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import verl_plugins
from verl_plugins.composition import manifest
from verl_plugins.composition.recipe import presets, recipes
from verl_plugins.errors import PluginError, nearest
from verl_plugins.hookspecs import STAGES

TEMPLATE = Path(__file__).parent / "template"
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def create(name: str, stage: str, folder: Path) -> list[Path]:
    """Write the package `folder/name`; returns its files.

    Raises:
        PluginError: the name cannot be used, is taken, or the folder exists; nothing has been written then.
    """
    if stage not in STAGES:
        raise PluginError(f"--stage {stage!r} is not a stage{nearest(stage, STAGES)}")
    _check_name(name, stage)
    if not folder.is_dir():
        raise PluginError(f"--dir {folder} is not a folder")
    root = folder / name
    if root.exists():
        raise PluginError(f"{root} is already there; choose another name or another --dir")
    files = {root / path: text for path, text in render(name, stage).items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)


def render(name: str, stage: str) -> dict[Path, str]:
    """The package's files and what is in them."""
    forms = {
        "my_method": name,
        "my-method": name.replace("_", "-"),
        "MyMethod": _class_name(name),
        "My method": name.replace("_", " ").capitalize(),
        "the_stage": stage,
    }
    form = re.compile("|".join(forms))
    rendered = {}
    for part in ("common", stage):
        for file in sorted((TEMPLATE / part).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                path, text = file.relative_to(TEMPLATE / part).as_posix(), file.read_text(encoding="utf-8")
                path, text = (form.sub(lambda found: forms[found[0]], part) for part in (path, text))
                rendered[Path(path)] = text
    return rendered


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _imported(stage: str) -> set[str]:
    """Names that the method's file of a template imports."""
    code = ast.parse((TEMPLATE / stage / "src/my_method/method.py").read_text(encoding="utf-8"))
    imports = [node for node in code.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _check_name(name: str, stage: str) -> None:
    from importlib.util import find_spec
    from keyword import iskeyword

    if not NAME.fullmatch(name) or iskeyword(name):
        raise PluginError(
            f"{name!r} cannot be the name of a package: lower-case words joined by underscores can, as in 'my_method'"
        )
    installed = manifest.entries()
    folders = manifest.folders(installed)
    known = [(item.name, item.distribution) for item in (*recipes(folders), *presets(folders))]
    known += [(entry.name, entry.dist.name if entry.dist else "") for entry in installed]
    for other, owner in known:
        if other == name:
            raise PluginError(f"{name!r} is already a name that {owner} uses; choose another")
    if find_spec(name) is not None or _class_name(name) in {*verl_plugins.__all__, *_imported(stage)}:
        raise PluginError(f"{name!r} would hide what Python or verl_plugins calls so; choose another name")

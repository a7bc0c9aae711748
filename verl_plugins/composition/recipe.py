"""Recipes and presets: YAML files found through entry points, described, and combined.

A recipe has the root keys `recipe` (what it is), `plugins` (what it switches on) and verl overrides, nested as in
verl's configuration. A preset (in the folder `presets` beside the recipes) has `preset` instead of `recipe`, and may
have a section `cpu` of its own. A key written `+key` is added where verl's configuration does not have it.

A recipe may name a lab (`verl_plugins.lab`); one of the kind `lab` has nothing else and cannot be trained with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import yaml

from verl_plugins.composition.manifest import Folder
from verl_plugins.composition.origin import install
from verl_plugins.errors import CompositionError, nearest
from verl_plugins.hookspecs import STAGES

RECIPE_KEYS = ("title", "problem", "does", "arxiv", "summary", "stages", "results", "status", "authors")
RECIPE_KEYS += ("kind", "lab")
KINDS = ("training", "lab")
PRESET_KEYS = ("title", "summary", "base", "requires", "env", "prepare", "sketch")
Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One recipe file."""

    name: str
    file: Path
    distribution: str
    title: str = ""
    problem: str = ""
    """What it is against: `list` groups recipes by `dead groups`, `entropy collapse`, `length`, … or words of yours."""
    does: str = ""
    """What it does about it, in one line."""
    arxiv: str = ""
    summary: str = ""
    stages: list[str] = field(default_factory=list)
    results: str = ""
    status: str = ""
    """What was measured, in a few words."""
    authors: dict[str, Any] = field(default_factory=dict)
    """What the authors trained with and the recipe leaves to the user: model, data, batch sizes, learning rate."""
    kind: str = KINDS[0]
    """`training`, or `lab`: a claim that is measured outside of RL, no training."""
    lab: str = ""
    """`module:function` that measures the paper's own claim (`verl_plugins.lab`); a training may have one, too."""
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    """verl settings, nested."""
    broken: str = ""


@dataclass(frozen=True)
class Combination:
    """Recipes that fit together."""

    parts: tuple[Recipe, ...]
    plugins: dict[str, dict[str, Any]]
    """United settings, in the order the plugins act."""

    @property
    def name(self) -> str:
        """As on the command line: `vade+clip_cov`."""
        return "+".join(part.name for part in self.parts)


@dataclass(frozen=True)
class Preset:
    """One preset file: hardware, model and data."""

    name: str
    file: Path
    distribution: str
    title: str = ""
    summary: str = ""
    base: str = ""
    """The preset that this one changes."""
    requires: dict[str, str] = field(default_factory=dict)
    """Packages that must be installed, each with what to tell pip to get it."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables the run starts with."""
    prepare: str = ""
    """`module:function` that makes model and data before the first run."""
    sketch: str = ""
    """`module:function`, a context manager over {key: path}: what `prepare` makes, without the work it takes."""
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    broken: str = ""


class Disagreement(CompositionError):
    """Recipes set keys to different values; overrides that settle it for the one or for the other are in `settled`."""

    def __init__(self, keys: Mapping[str, tuple[Any, Recipe, Any, Recipe]]) -> None:
        said = [
            f"{one.name} and {other.name} disagree on {key}: {_written(before)} and {_written(value)}"
            for key, (before, one, value, other) in keys.items()
        ]
        self.settled = tuple([f"{key}={_written(values[place])}" for key, values in keys.items()] for place in (0, 2))
        super().__init__(f"recipes {', '.join(said)}; say which it is, as in {' '.join(self.settled[0])}")


Item = TypeVar("Item", Recipe, Preset)


def recipes(folders: Iterable[Folder]) -> list[Recipe]:
    """Every installed recipe, duplicates and broken ones included, by name."""
    found = [_recipe(path, owner) for path, owner in _files(folders, "*.yaml")]
    return sorted(found, key=lambda recipe: (recipe.name, recipe.distribution))


def presets(folders: Iterable[Folder]) -> list[Preset]:
    """Every installed preset, by name."""
    found = [_preset(path, owner) for path, owner in _files(folders, "presets/*.yaml")]
    return sorted(found, key=lambda preset: (preset.name, preset.distribution))


def preset_chain(name: str, folders: Iterable[Folder]) -> list[Preset]:
    """The one usable preset called `name`, after the presets it is based on; what it requires must be installed."""
    known = presets(folders)
    chain = [_one("preset", name, known)]
    while base := chain[0].base:
        if base in {preset.name for preset in chain}:
            raise CompositionError(f"{chain[0].file}: preset.base is {base!r}, which is based on this preset")
        chain.insert(0, _one("preset", base, known))
    for preset in chain:
        for package, wanted in preset.requires.items():
            if not _is_installed(package):
                raise CompositionError(
                    f"preset {preset.name!r} needs {package}, which is not installed: {install(wanted)}"
                )
    return chain


def combine(names: Sequence[str], folders: Iterable[Folder], decided: Collection[str] = ()) -> Combination:
    """Several recipes as one: plugins united in the order given, equal keys must agree unless decided elsewhere."""
    known = recipes(folders)
    parts = tuple(_training(_one("recipe", name, known)) for name in dict.fromkeys(names))
    plugins: dict[str, Any] = {}
    seen: dict[Path_, tuple[Any, Recipe]] = {}
    disagreed: dict[str, tuple[Any, Recipe, Any, Recipe]] = {}
    for part in parts:
        for path, value in leaves({"plugins": part.plugins, **part.overrides}):
            before, other = (value, part) if value == {} else seen.setdefault(path, (value, part))
            if (before != value or type(before) is not type(value)) and _key(path) not in decided:
                disagreed.setdefault(_key(path), (before, other, value, part))
        for path, value in leaves(part.plugins):
            put(plugins, path, value)
    if disagreed:
        raise Disagreement(disagreed)
    return Combination(parts, plugins)


def of_lab(name: str, folders: Iterable[Folder]) -> Recipe:
    """The one usable recipe called `name`, which has a lab."""
    known = recipes(folders)
    found = _one("recipe", name, known)
    if not found.lab:
        labs = ", ".join(item.name for item in known if item.lab)
        raise CompositionError(f"recipe {name!r} has no lab; recipes with one: {labs}")
    return found


def leaves(tree: Mapping[str, Any], above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """(path, value) of everything that is not a mapping with keys."""
    for key, value in tree.items():
        path = (*above, str(key))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def put(tree: dict[str, Any], path: Path_, value: Any) -> None:
    """Set a leaf of a nested mapping; an empty mapping never replaces a filled one."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    if value == {} and isinstance(value, dict):
        tree.setdefault(path[-1], {})
    else:
        tree[path[-1]] = value


def _training(item: Recipe) -> Recipe:
    if item.kind == "lab":
        raise CompositionError(
            f"recipe {item.name!r} is a lab, which trains nothing and goes with no other recipe; to run it: "
            f"verl-plugins lab {item.name}"
        )
    return item


def _key(path: Path_) -> str:
    return ".".join(key.removeprefix("+") for key in path)


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    return json.dumps(value) if value is None or isinstance(value, (bool, list, dict)) else str(value)


def _one(kind: str, name: str, known: Sequence[Item]) -> Item:
    found = [item for item in known if item.name == name]
    if not found:
        raise CompositionError(
            f"there is no {kind} {name!r}{nearest(name, {item.name for item in known if not item.broken})}"
        )
    if len(found) > 1:
        owners = " and ".join(f"{item.distribution} ({item.file})" for item in found)
        raise CompositionError(f"{kind} {name!r} is brought by {owners}: uninstall one of them")
    if found[0].broken:
        raise CompositionError(found[0].broken)
    return found[0]


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _files(folders: Iterable[Folder], pattern: str) -> list[tuple[Path, str]]:
    usable = [folder for folder in folders if not folder.broken]
    return [(path, folder.distribution) for folder in usable for path in sorted(folder.path.glob(pattern))]


def _recipe(path: Path, owner: str) -> Recipe:
    try:
        tree = _tree(path)
        about = _about(tree, "recipe", RECIPE_KEYS, path)
        plugins = _plugins(tree.pop("plugins", None) or {}, path)
        if unknown := [stage for stage in about.get("stages", []) if stage not in STAGES]:
            raise CompositionError(f"{path}: recipe.stages has {unknown[0]!r}{nearest(unknown[0], STAGES)}")
        about["arxiv"] = str(about.get("arxiv", ""))
        _must_be_function(about, "lab", f"{path}: recipe")
        _must_be_of_a_kind(about, {**tree, "plugins": plugins, "recipe.stages": about.get("stages")}, path)
        return Recipe(path.stem, path, owner, **about, plugins=plugins, overrides=tree)
    except CompositionError as error:
        return Recipe(path.stem, path, owner, broken=str(error))


def _preset(path: Path, owner: str) -> Preset:
    try:
        tree = _tree(path)
        about = _about(tree, "preset", PRESET_KEYS, path)
        for key in ("env", "requires"):
            about[key] = _texts(about.get(key) or {}, f"{path}: preset.{key}")
        plugins = _plugins(tree.pop("plugins", None) or {}, path)
        for key in ("prepare", "sketch"):
            _must_be_function(about, key, f"{path}: preset")
        return Preset(path.stem, path, owner, **about, plugins=plugins, overrides=tree)
    except CompositionError as error:
        return Preset(path.stem, path, owner, broken=str(error))


def _tree(path: Path) -> dict[str, Any]:
    """What is in the file, the caller's to change."""
    return deepcopy(_read(path, path.stat().st_mtime_ns if path.exists() else 0))


@lru_cache(maxsize=256)
def _read(path: Path, changed: int) -> dict[str, Any]:
    """What was in the file at the time `changed`; each composition reads all recipes."""
    try:
        tree = _Loader(path.read_text(encoding="utf-8")).get_single_data()
        json.dumps(tree, default=str, skipkeys=True)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        circular = "an alias stands inside what it names" if "Circular" in str(error) else ""
        raise CompositionError(f"{path} cannot be read: {circular or ' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise CompositionError(f"{path}: the file must be a mapping")
    return tree


def _about(tree: dict[str, Any], root: str, known: Sequence[str], path: Path) -> dict[str, Any]:
    about = tree.pop(root, None)
    if not isinstance(about, dict):
        raise CompositionError(f"{path}: the root key {root!r} is missing or not a mapping")
    for key in about:
        if key not in known:
            raise CompositionError(f"{path}: {root}.{key} is not a key{nearest(str(key), known)}")
    return about


def _must_be_function(about: Mapping[str, Any], key: str, where: str) -> None:
    if not re.fullmatch(r"([\w.]+:\w+)?", str(about.get(key, ""))):
        raise CompositionError(f"{where}.{key} is {about[key]!r}: it must be 'module:function'")


def _must_be_of_a_kind(about: Mapping[str, Any], rest: Mapping[str, Any], path: Path) -> None:
    """`rest` is what a training has and a lab has not."""
    kind = about.get("kind", KINDS[0])
    if kind not in KINDS:
        raise CompositionError(f"{path}: recipe.kind is {kind!r}: it must be {' or '.join(KINDS)}")
    if kind == "lab" and not about.get("lab"):
        raise CompositionError(f"{path}: recipe.kind is lab, so recipe.lab must name its function as 'module:function'")
    if kind == "lab" and (given := [key for key, value in rest.items() if value]):
        raise CompositionError(f"{path}: recipe.kind is lab, which trains nothing: remove {given[0]!r}")


def _plugins(section: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(section, dict):
        raise CompositionError(f"{path}: plugins must be a mapping of plugin name to settings")
    for name, settings in section.items():
        if not isinstance(settings or {}, dict):
            raise CompositionError(f"{path}: plugins.{name} is {settings!r}: it must be a mapping of settings")
    return {name: settings or {} for name, settings in section.items()}


def _texts(section: Any, where: str) -> dict[str, str]:
    if not isinstance(section, dict):
        raise CompositionError(f"{where} must be a mapping of names to texts")
    for name, value in section.items():
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise CompositionError(f"{where}.{name} is {value!r}: it must be text or a number")
    return {name: str(value) for name, value in section.items()}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML as verl's own files are read: `1e-6` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)

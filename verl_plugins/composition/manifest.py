"""What is installed, known without importing a plugin: entry points of the group `verl_plugins`, read by `ast`.

Two kinds of entry point. One whose name is `recipes`, or ends with `.recipes` or `-recipes`, points at a folder of
recipe files (`package:ATTRIBUTE`, a path). Every other one points at a plugin class (`package.module:Class`), and its
name is the plugin's. A class that cannot be read from its source (a computed default, an inherited hook) is imported.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_plugins.composition.source import Field, NotLiteral, class_source, fields_of_parameter, missing_import
from verl_plugins.errors import CompositionError, nearest
from verl_plugins.hookspecs import API_VERSION, FIRST_RESULT, PROJECT, STAGES
from verl_plugins.plugin import Plugin

GROUP = PROJECT
ALLOW_VARIABLE = "VERL_PLUGINS_ALLOW"
"""Names of the plugins that may be loaded, with commas between; set but empty allows none."""
BLOCK_VARIABLE = "VERL_PLUGINS_BLOCK"
"""Names of plugins that are treated as if they were not installed; empty blocks none."""


@dataclass(frozen=True)
class Setting:
    """One field of a plugin's Config."""

    name: str
    type: str
    default: Any
    """MISSING when the setting is required."""
    doc: str = ""
    authors: Any = field(default_factory=lambda: MISSING)
    """The authors' value; MISSING when not stated."""
    bounds: dict[str, Any] = field(default_factory=dict)
    """ge, gt, le, lt, choices, as far as given."""


@dataclass(frozen=True)
class Hook:
    """One stage a plugin implements."""

    stage: str
    wrapper: bool = False
    trylast: bool = False
    tryfirst: bool = False

    @property
    def kind(self) -> str:
        """`wraps`, `default` (gives way to any other plugin) or `implements`."""
        if self.wrapper:
            return "wraps"
        return "default" if self.trylast and self.stage in FIRST_RESULT else "implements"


@dataclass(frozen=True)
class Manifest:
    """A plugin as `list` and `show` know it."""

    name: str
    target: str
    """`package.module:Class`."""
    distribution: str
    distribution_version: str
    idea: str = ""
    """First paragraph of the module's docstring, else of the class's."""
    paper: str = ""
    version: str = Plugin.version
    api: int = API_VERSION
    verl: str = Plugin.verl
    needs: frozenset[str] = Plugin.needs
    hooks: tuple[Hook, ...] = ()
    """In the order the stages run."""
    settings: tuple[Setting, ...] = ()
    broken: str = ""
    """Why the plugin cannot be used; empty when it can."""

    @property
    def owner(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.distribution_version}".strip()

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings that have a default."""
        return {setting.name: setting.default for setting in self.settings if setting.default is not MISSING}


@dataclass(frozen=True)
class Folder:
    """A folder of recipes and the distribution that brings it."""

    path: Path
    distribution: str
    broken: str = ""


def entries() -> list[EntryPoint]:
    """All entry points of the group that may be used, by name and distribution: a scan of every installed package."""
    return [entry for entry in installed() if is_recipes(entry) or not barred(entry.name)]


def installed() -> list[EntryPoint]:
    """All entry points of the group, kept out or not."""
    return sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _owner(entry)))


def of_others(installed: Sequence[EntryPoint], own: str) -> list[EntryPoint]:
    """Without the plugins of distribution `own` that nobody else brings too: a quarter of the time of `list`."""
    brought = Counter(entry.name for entry in installed)
    return [entry for entry in installed if is_recipes(entry) or _owner(entry) != own or brought[entry.name] > 1]


def barred(name: str) -> str:
    """The environment variable that keeps plugin `name` out, or ``."""
    if name in names_in(BLOCK_VARIABLE):
        return BLOCK_VARIABLE
    return ALLOW_VARIABLE if ALLOW_VARIABLE in os.environ and name not in names_in(ALLOW_VARIABLE) else ""


def names_in(variable: str) -> list[str]:
    """The plugin names an environment variable lists."""
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


def is_recipes(entry: EntryPoint) -> bool:
    """Whether the entry point gives a folder of recipes rather than a plugin."""
    return entry.name == "recipes" or entry.name.endswith((".recipes", "-recipes"))


def manifests(installed: Iterable[EntryPoint]) -> list[Manifest]:
    """Every installed plugin, duplicates and broken ones included."""
    return [describe(entry) for entry in installed if not is_recipes(entry)]


def folders(installed: Iterable[EntryPoint]) -> list[Folder]:
    """Every installed folder of recipes."""
    return [_folder(entry) for entry in installed if is_recipes(entry)]


def find(name: str, installed: Iterable[EntryPoint]) -> Manifest:
    """The one usable plugin called `name`, or a CompositionError: unknown, brought twice, or broken."""
    plugins = [entry for entry in installed if not is_recipes(entry)]
    found = [describe(entry) for entry in plugins if entry.name == name]
    if not found and (variable := barred(name)):
        raise CompositionError(
            f"plugin {name!r} is kept out by {variable}={os.environ[variable]!r}: change or unset it"
        )
    if not found:
        raise CompositionError(f"plugin {name!r} is not installed{nearest(name, usable(plugins))}")
    if len(found) > 1:
        owners = " and ".join(manifest.owner for manifest in found)
        raise CompositionError(f"plugin {name!r} is brought by {owners}: uninstall one of them")
    if found[0].broken:
        raise CompositionError(f"plugin {name!r} of {found[0].owner} cannot be loaded: {found[0].broken}")
    return found[0]


def usable(installed: Iterable[EntryPoint]) -> set[str]:
    """Names of the plugins that can be used: neither broken nor brought twice."""
    found = manifests(installed)
    names = [plugin.name for plugin in found]
    return {plugin.name for plugin in found if not plugin.broken and names.count(plugin.name) == 1}


def describe(entry: EntryPoint) -> Manifest:
    """Read one plugin; whatever goes wrong ends in `broken`."""
    try:
        return _from_source(entry)
    except NotLiteral:
        return _from_import(entry)
    except (OSError, SyntaxError, LookupError, ValueError, ImportError) as error:
        return Manifest(**_owned(entry), broken=_cause(error))


def lab_settings(target: str) -> tuple[Setting, ...]:
    """Settings of a lab, `module:function`, as its source says them.

    Raises:
        CompositionError: they cannot be read.
    """
    module, _, function = target.partition(":")
    try:
        return settings(fields_of_parameter(locate(module), function, "settings"))
    except (NotLiteral, OSError, SyntaxError, LookupError, ValueError, ImportError) as error:
        raise CompositionError(f"the settings of {target} cannot be read: {_cause(error)}") from error


def from_class(cls: type, owned: dict[str, str]) -> Manifest:
    """The manifest of an imported plugin class."""
    found = [(name, getattr(member, f"{PROJECT}_impl", None)) for name, member in inspect.getmembers(cls)]
    hooks = [_hook(options.get("specname") or name, options) for name, options in found if options]
    return _manifest(
        owned,
        doc=inspect.getdoc(inspect.getmodule(cls)) or cls.__doc__ or "",
        attributes={key: getattr(cls, key) for key in _ATTRIBUTES if hasattr(cls, key)},
        hooks=hooks,
        settings=settings_of(cls.Config),
    )


def settings(found: Iterable[Field]) -> tuple[Setting, ...]:
    """Settings as the source says them."""
    return tuple(Setting(name, type_, default, **_metadata(said)) for name, type_, default, said in found)


def settings_of(config_class: type) -> tuple[Setting, ...]:
    """Settings of an imported dataclass."""
    found = [(item.name, _type_text(item.type), item.default, dict(item.metadata)) for item in fields(config_class)]
    return settings(found)


_ATTRIBUTES = ("name", "paper", "version", "api", "verl", "needs")


def _from_source(entry: EntryPoint) -> Manifest:
    source = class_source(locate(entry.module), entry.attr)
    if cause := missing_import(source.module):
        return Manifest(**_owned(entry), broken=cause)
    return _manifest(
        _owned(entry),
        doc=source.doc,
        attributes=source.attributes(_ATTRIBUTES),
        hooks=[_hook(name, options) for name, options in source.hooks()],
        settings=settings(source.settings()),
    )


def _manifest(
    owned: dict[str, str], doc: str, attributes: dict[str, Any], hooks: Iterable[Hook], settings: tuple[Setting, ...]
) -> Manifest:
    name = attributes.pop("name", None)
    broken = "" if name == owned["name"] else f"its entry point is called {owned['name']!r} but its class {name!r}"
    if "needs" in attributes:
        attributes["needs"] = frozenset(attributes["needs"])
    order = {stage: place for place, stage in enumerate(STAGES)}
    return Manifest(
        **owned,
        idea=" ".join(doc.strip().split("\n\n")[0].split()),
        hooks=tuple(sorted(hooks, key=lambda hook: order.get(hook.stage, len(order)))),
        settings=settings,
        broken=broken,
        **attributes,
    )


def _hook(stage: str, options: dict[str, Any]) -> Hook:
    wrapper = bool(options.get("wrapper") or options.get("hookwrapper"))
    return Hook(stage, wrapper, bool(options.get("trylast")), bool(options.get("tryfirst")))


def _metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    bounds = {key: metadata[key] for key in ("ge", "gt", "le", "lt", "choices") if metadata.get(key) is not None}
    return {"doc": metadata.get("doc", ""), "authors": metadata.get("authors", MISSING), "bounds": bounds}


def _type_text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def locate(module: str) -> Path:
    """The source file of a module, found without executing it or its parent packages."""
    parts = module.split(".")
    spec = find_spec(parts[0])
    for depth in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            break
        spec = PathFinder.find_spec(".".join(parts[:depth]), spec.submodule_search_locations)
    if spec is None:
        raise ModuleNotFoundError(f"there is no module {module!r}")
    if not (spec.origin and spec.origin.endswith(".py")):
        raise NotLiteral(f"module {module!r} has no source file")
    return Path(spec.origin)


def _folder(entry: EntryPoint) -> Folder:
    try:
        path = Path(entry.load())
    except Exception as error:
        return Folder(Path(), _owner(entry), _cause(error))
    return Folder(path, _owner(entry), "" if path.is_dir() else f"there is no folder {path}")


def _from_import(entry: EntryPoint) -> Manifest:
    """Importing may raise anything, and the other plugins must still be listed."""
    try:
        return from_class(entry.load(), _owned(entry))
    except Exception as error:
        return Manifest(**_owned(entry), broken=_cause(error))


def _owned(entry: EntryPoint) -> dict[str, str]:
    name, version = _distribution(entry.dist)
    return {"name": entry.name, "target": entry.value, "distribution": name, "distribution_version": version}


def _owner(entry: EntryPoint) -> str:
    return _distribution(entry.dist)[0]


@lru_cache(maxsize=64)
def _distribution(dist: Distribution | None) -> tuple[str, str]:
    """Name and version; reading them means to parse the distribution's metadata, which all its entries share."""
    return (dist.metadata["Name"], dist.metadata["Version"]) if dist else ("", "")


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

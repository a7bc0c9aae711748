"""One override of the command line, in Hydra's grammar, applied to a composed configuration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from verl_plugins.composition import manifest
from verl_plugins.composition.recipe import recipes
from verl_plugins.errors import CompositionError, nearest


def parse(text: str) -> Override:
    """`a.b=c`, `+a.b=c`, `++a.b=c` or `~a.b`."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise CompositionError(
            f"override {text!r} is not one of key=value, +key=value, ++key=value, ~key; quote a value with spaces, "
            f"commas or brackets as in 'key=\"a, b\"'"
        ) from error
    if override.is_sweep_override():
        raise CompositionError(f"override {text!r} gives several values: give one, or a list as in key=[a,b]")
    return override


def apply(config: DictConfig, overrides: Iterable[Override], installed: Sequence[EntryPoint]) -> None:
    """Change, add or remove keys of the configuration in place; `installed` plugins are hinted at."""
    known = known_keys(config)
    for override in overrides:
        _apply(config, override, known, installed)
        key, value = override.key_or_group, None if override.is_delete() else override.value()
        plain = key in known and not override.is_delete() and not isinstance(value, dict)
        known = {**known, key: value} if plain else known_keys(config)


def _apply(config: DictConfig, override: Override, known: Mapping[str, Any], installed: Sequence[EntryPoint]) -> None:
    key, line = override.key_or_group, override.input_line
    adds = override.is_add() or override.is_force_add()
    if key not in known and not adds:
        raise CompositionError(_no_such_key(key, line, known, installed))
    if override.is_delete():
        _remove(config, key)
        return
    value = override.value()
    if override.is_add() and known.get(key) is not None and not isinstance(value, (dict, list)):
        raise CompositionError(f"override {line!r}: {key!r} exists already; to change it, write {line[1:]!r}")
    put_key(config, key, value, known, f"override {line!r}", add=adds)


def put_key(config: DictConfig, key: str, value: Any, known: Mapping[str, Any], where: str, *, add: bool) -> None:
    """Set a key; a section is not replaced by a plain value, nor the other way round."""
    if isinstance(known.get(key), dict) and not (value is None or isinstance(value, Mapping)):
        raise CompositionError(f"{where}: {key!r} is a section and cannot be set to {value!r}")
    for above in prefixes(key)[:-1]:
        if not isinstance(known.get(above), (dict, type(None))):
            raise CompositionError(f"{where}: {above!r} is not a section, its value is {known[above]!r}")
    try:
        OmegaConf.update(config, key, value, merge=True, force_add=add)
    except OmegaConfBaseException as error:
        raise CompositionError(f"{where}: {one_line(error)}") from error


def prefixes(key: str) -> list[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def known_keys(config: DictConfig) -> dict[str, Any]:
    """Every dotted key of the configuration with its value, sections included, nothing resolved."""
    found: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while todo:
        above, tree = todo.pop()
        for name, value in tree.items():
            found[f"{above}{name}"] = value
            if isinstance(value, dict):
                todo.append((f"{above}{name}.", value))
    return found


def nearest_key(key: str, known: Mapping[str, Any]) -> str:
    """The known key most like `key`: one that ends with it, or a similar one; '' when nothing is close."""
    ends = sorted((name for name in known if name.endswith(f".{key}")), key=len)
    others = set(known).difference(prefixes(key))
    return next(iter(ends or difflib.get_close_matches(key, others, n=1, cutoff=0.7)), "")


def one_line(error: BaseException) -> str:
    """An error's first line."""
    return str(error).strip().split("\n")[0]


def _remove(config: DictConfig, key: str) -> None:
    above, _, name = key.rpartition(".")
    section = OmegaConf.select(config, above) if above else config
    with open_dict(section):
        del section[name]


def _no_such_key(key: str, line: str, known: Mapping[str, Any], installed: Sequence[EntryPoint]) -> str:
    """What is wrong with an override of a key that does not exist, and the override to use instead."""
    if key.startswith("plugins."):
        return f"override {line!r}: {_no_such_plugin_key(key, known['plugins'], installed)}"
    if line.startswith("~"):
        return f"override {line!r}: there is no key {key!r} to remove"
    section = known.get(key.rpartition(".")[0])
    close = "" if section == {} else nearest_key(key, known)
    hint = f"did you mean {line.replace(key, close, 1)!r}?" if close else f"to add it, write {'+' + line!r}"
    return f"override {line!r}: there is no key {key!r}; {hint}"


def _no_such_plugin_key(key: str, selected: Mapping[str, Any], installed: Sequence[EntryPoint]) -> str:
    name, _, setting = key.removeprefix("plugins.").partition(".")
    if name in selected:
        return f"{setting!r} is not a setting of {name}{nearest(setting, selected[name])}"
    names = {entry.name for entry in installed if not manifest.is_recipes(entry)}
    if name not in names:
        return f"plugin {name!r} is not installed{nearest(name, manifest.usable(installed))}"
    offering = [recipe.name for recipe in recipes(manifest.folders(installed)) if name in recipe.plugins]
    others = f" or combine the recipe with +{min(offering, key=lambda other: other != name)}" if offering else ""
    return f"plugin {name!r} is not switched on; write '+plugins.{name}={{}}'{others}"

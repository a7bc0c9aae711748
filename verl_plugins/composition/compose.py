"""The configuration of a run: verl's defaults < preset < recipe < command line, without importing verl.

The command line has Hydra's grammar: `a.b=c` changes, `+a.b=c` adds, `++a.b=c` does either, `~a.b` removes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.composition import manifest, separate, teacher
from verl_plugins.composition.override import apply, known_keys, nearest_key, one_line, parse, prefixes, put_key
from verl_plugins.composition.recipe import Preset, Recipe, combine, leaves, preset_chain
from verl_plugins.errors import CompositionError, nearest

FREE_FORM = ("ray_kwargs.ray_init", "ray_kwargs.ray_init.runtime_env")
"""Sections whose keys verl passes on as they are, besides the empty ones (`{}`) of its configuration."""
OWN_SECTIONS = ("cpu", "lookup", "roles", "smollm2")
"""Sections a preset may bring that verl does not know."""


@dataclass(frozen=True)
class Composed:
    """Everything a run needs to start."""

    config: DictConfig
    """verl's configuration with the section `plugins` and, in the CPU preset, `cpu`."""
    recipe: str
    """As named on the command line: `vade+clip_cov`."""
    preset: str | None
    overrides: list[str]
    """The command line's."""
    env: dict[str, str]
    prepare: str | None
    """`module:function` that makes model and data before the run."""
    sketch: str | None
    """`module:function` that enters what `prepare` makes, and says where it can be looked at beforehand."""
    defaults: DictConfig
    """verl's own configuration, to compare with."""
    given: frozenset[str]
    """Keys that preset, recipe or command line set."""
    asked: frozenset[str]
    """Those of them that the command line does."""

    @property
    def plugins(self) -> dict[str, dict[str, Any]]:
        """The section `plugins` as plain data: what `manager.build` takes, in every process."""
        return OmegaConf.to_container(self.config.plugins, resolve=True)


def compose(recipes: str, preset: str | None = None, overrides: Sequence[str] = ()) -> Composed:
    """Compose a run; CompositionError names the key and the file or override that does not fit."""
    installed = manifest.entries()
    folders = manifest.folders(installed)
    parsed = [parse(text) for text in overrides]
    chosen = combine([name.strip() for name in recipes.split("+")], folders, {item.key_or_group for item in parsed})
    presets = preset_chain(preset, folders) if preset else []
    files = [*presets, *chosen.parts]
    groups = _groups(files, parsed)
    defaults = verl_config(groups)
    config = changeable(defaults)
    for file in files:
        _merge(config, file, _free_sections(tuple(groups)), groups)
        for name, given in file.plugins.items():
            _expanded(name, given, str(file.file), installed)
    with open_dict(config):
        config.plugins = OmegaConf.merge(*[part.plugins for part in presets], chosen.plugins)
    _expand_plugins(config, installed)
    apply(config, [item for item in parsed if not _is_group(item.get_key_element(), item.value())], installed)
    _expand_plugins(config, installed)
    asked = frozenset(item.key_or_group for item in parsed if not item.is_delete())
    given = asked.union(*[_keys_of(file) for file in files])
    separate.settle(config, given, asked)
    teacher.settle(config, asked)
    return Composed(
        config=config,
        recipe=chosen.name,
        preset=preset,
        overrides=list(overrides),
        env={name: value for part in presets for name, value in part.env.items()},
        prepare=next((part.prepare for part in reversed(presets) if part.prepare), None),
        sketch=next((part.sketch for part in reversed(presets) if part.sketch), None),
        defaults=defaults,
        given=given,
        asked=asked,
    )


def verl_config(groups: Sequence[str] = ()) -> DictConfig:
    """verl's `ppo_trainer` configuration, with group choices such as `model_engine=megatron`; it cannot be changed."""
    for group in groups:
        key, _, choice = group.lstrip("+").partition("=")
        choices = {file.stem for file in (config_dir() / key).glob("*.yaml")}
        if choices and choice not in choices:
            hint = nearest(choice, choices)
            raise CompositionError(f"{group} does not fit verl's configuration: there is no {choice!r}{hint}")
    return _composed_by_hydra(str(config_dir()), tuple(groups))


@cache
def _composed_by_hydra(folder: str, groups: tuple[str, ...]) -> DictConfig:
    """Reads thirty files, which takes a second."""
    try:
        with initialize_config_dir(folder, version_base=None):
            config = hydra_compose("ppo_trainer", list(groups))
            OmegaConf.set_readonly(config, True)
            return config
    except HydraException as error:
        raise CompositionError(f"{', '.join(groups)} does not fit verl's configuration: {one_line(error)}") from error


def config_dir() -> Path:
    """verl's folder of configuration files, found without importing verl."""
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise CompositionError("verl is not installed: install verl>=0.9.1,<0.10")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def _groups(files: Sequence[Preset | Recipe], parsed: Sequence[Override]) -> list[str]:
    from_files = [f"{key}={value}" for file in files for key, value in file.overrides.items() if _is_group(key, value)]
    return from_files + [item.input_line for item in parsed if _is_group(item.get_key_element(), item.value())]


def _is_group(key: str, value: Any) -> bool:
    """Whether `key: value` chooses one of verl's files (`model_engine: megatron`) instead of setting a key."""
    key = key.lstrip("+~")
    return isinstance(value, str) and ("@" in key or (config_dir() / key).is_dir())


def changeable(config: DictConfig) -> DictConfig:
    """A copy that may be changed; a copy takes a tenth of a second."""
    copied = config.copy()
    OmegaConf.set_readonly(copied, None)
    return copied


@cache
def _free_sections(groups: tuple[str, ...]) -> frozenset[str]:
    """Sections to which keys may be added: those that are empty in verl's configuration, and FREE_FORM."""
    return frozenset(key for key, value in known_keys(verl_config(groups)).items() if value == {}) | set(FREE_FORM)


def _merge(config: DictConfig, file: Preset | Recipe, free: frozenset[str], groups: Sequence[str]) -> None:
    """Merge one file; a key that verl does not have must be in a free section or be written `+key`."""
    known = known_keys(config)
    for path, value in leaves(file.overrides):
        if len(path) == 1 and _is_group(path[0], value):
            continue
        keys = [key.removeprefix("+") for key in path]
        above = {".".join(keys[:depth]) for depth in range(1, len(keys))}
        own = isinstance(file, Preset) and keys[0] in OWN_SECTIONS
        if not (own or above & free or any(key.startswith("+") for key in path)):
            _must_exist(".".join(keys), known, file, groups)
        put_key(config, ".".join(keys), value, known, str(file.file), add=True)


def _keys_of(file: Preset | Recipe) -> set[str]:
    return {".".join(key.removeprefix("+") for key in path) for path, _ in leaves(file.overrides)}


def _must_exist(key: str, known: Mapping[str, Any], file: Preset | Recipe, groups: Sequence[str]) -> None:
    if key in known:
        return
    first = next(name for name in prefixes(key) if name not in known)
    if groups and key in known_keys(verl_config()):
        who = f"{'preset' if isinstance(file, Preset) else 'recipe'} {file.name!r}"
        raise CompositionError(
            f"{', '.join(groups)} does not go with {who}, which sets {first!r}, a key that is gone then: leave "
            f"{', '.join(groups)} out, or choose another preset, as in --preset 1gpu"
        )
    close = nearest_key(key, known) or nearest_key(first, known)
    hint = f"did you mean {close!r}, or " if close else ""
    added = f"+{first.rpartition('.')[2]}"
    raise CompositionError(f"{file.file}: verl's configuration has no key {first!r}; {hint}write {added!r} to add it")


def _expand_plugins(config: DictConfig, installed: Sequence[EntryPoint]) -> None:
    """Give every plugin of the section all its settings, so that plain overrides reach them."""
    given = OmegaConf.to_container(config.plugins, resolve=False)
    expanded = {name: _expanded(name, settings or {}, "command line", installed) for name, settings in given.items()}
    with open_dict(config):
        config.plugins = expanded
    OmegaConf.set_struct(config, True)


def _expanded(name: str, given: Mapping[str, Any], where: str, installed: Sequence[EntryPoint]) -> dict[str, Any]:
    """A plugin's settings, defaults filled in; unknown plugins and settings are refused here, values in `manager`."""
    try:
        plugin = manifest.find(name, installed)
    except CompositionError as error:
        raise CompositionError(f"{where}: {error}") from error
    known = {setting.name: setting.default for setting in plugin.settings}
    for setting in given:
        if setting not in known:
            hint = nearest(str(setting), known) if known else "; it has no settings"
            raise CompositionError(f"{where}: plugins.{name}.{setting} is not a setting of {name}{hint}")
    return {key: given.get(key, "???" if value is MISSING else value) for key, value in known.items()}

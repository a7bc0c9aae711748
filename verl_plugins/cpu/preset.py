"""What the preset `cpu` needs before a run: model, task and teacher, made once and kept in a cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from verl_plugins.composition import teacher
from verl_plugins.composition.cache import cache_folder
from verl_plugins.composition.settings import typed
from verl_plugins.cpu import warmup
from verl_plugins.cpu.model import ModelSettings
from verl_plugins.cpu.task import TaskSettings
from verl_plugins.cpu.warmup import Prepared, WarmupSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from verl_plugins.composition.manager import Plugins

TEACHER = f"{teacher.MODELS}.{teacher.SINGLE}.model_path"
Settings = tuple[ModelSettings, TaskSettings, WarmupSettings]


def prepare(config: DictConfig) -> None:
    """Enter the paths of model and data of `config.cpu` where the user has named no others, and make what is used."""
    settings, shaping = _settings(config), _shaping(config)
    used = enter(config, _places(warmup.locate(cache_folder(), *settings, shaping=shaping)))
    if used:
        warmup.prepare(cache_folder(), *settings, shaping=shaping)
    taught = _teacher(config)
    if taught is not None and _enter_teacher(config, warmup.locate(cache_folder(), *taught).model_path):
        warmup.prepare(cache_folder(), *taught)


@contextmanager
def sketch(config: DictConfig) -> Iterator[dict[str, Path]]:
    """Enter what `prepare` enters, and yield where each can be looked at: in the cache, or without weights beside "
    "it."""
    settings = _settings(config)
    made = warmup.locate(cache_folder(), *settings, shaping=_shaping(config))
    used = enter(config, _places(made))
    with tempfile.TemporaryDirectory(prefix="verl_plugins_sketch_") as folder:
        there = made if made.model_path.is_dir() or not used else warmup.sketch(Path(folder), *settings[:2])
        places = _places(there)
        seen = {key: places[key] for key in used}
        if (taught := _teacher(config)) is not None:
            path = warmup.locate(cache_folder(), *taught).model_path
            if _enter_teacher(config, path):
                model, task, _ = taught
                seen[TEACHER] = path if path.is_dir() else warmup.sketch(Path(folder, "t"), model, task).model_path
        yield seen


def _teacher(config: DictConfig) -> Settings | None:
    """What the run's teacher is made of; None where there is none, or another than verl's single one."""
    from omegaconf import OmegaConf

    if not teacher.is_on(config) or [key for key, _ in teacher.models(config)] != [TEACHER.rpartition(".")[0]]:
        return None
    model, task, _ = _settings(config)
    given = OmegaConf.to_container(config.get("cpu", {}), resolve=True).get("teacher")
    return model, task, typed(WarmupSettings, given, "cpu.teacher")


def _enter_teacher(config: DictConfig, path: Path) -> bool:
    """Name the teacher where nobody has named one; whether it is the one that is made now."""
    from omegaconf import OmegaConf

    if OmegaConf.select(config, TEACHER) is None:
        OmegaConf.update(config, TEACHER, str(path))
    return OmegaConf.select(config, TEACHER) == str(path)


def _settings(config: DictConfig) -> Settings:
    from omegaconf import OmegaConf

    section = OmegaConf.to_container(config.get("cpu", {}), resolve=True)
    return (
        typed(ModelSettings, section.get("model"), "cpu.model"),
        typed(TaskSettings, section.get("task"), "cpu.task"),
        typed(WarmupSettings, section.get("warmup"), "cpu.warmup"),
    )


def _shaping(config: DictConfig) -> Plugins:
    """The plugins that shape logits in the run: the model is warmed up under them."""
    from omegaconf import OmegaConf

    from verl_plugins.bridge.logits import shaping

    return shaping(OmegaConf.to_container(config.plugins, resolve=True))


def enter(config: DictConfig, made: Mapping[str, Path]) -> list[str]:
    """Name what is made, by key, where nothing is named; the keys that are what is made now."""
    from omegaconf import OmegaConf

    places = {key: str(path) for key, path in made.items()}
    for key, path in places.items():
        above, _, leaf = key.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(config, above), leaf):
            OmegaConf.update(config, key, path)
    if OmegaConf.is_missing(config.critic.model, "path"):
        config.critic.model.path = config.actor_rollout_ref.model.path
    return [key for key, path in places.items() if OmegaConf.select(config, key) == path]


def _places(made: Prepared) -> dict[str, Path]:
    return {
        "actor_rollout_ref.model.path": made.model_path,
        "data.train_files": made.train_file,
        "data.val_files": made.val_file,
    }

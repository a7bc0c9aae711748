"""What the preset `cpu` needs before a run starts: its model and its task, made once and kept in a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from verl_plugins.cpu.model import ModelSettings
from verl_plugins.cpu.task import TaskSettings
from verl_plugins.cpu.warmup import WarmupSettings
from verl_plugins.cpu.warmup import prepare as prepare_files
from verl_plugins.settings import typed

if TYPE_CHECKING:
    from omegaconf import DictConfig

CACHE_VARIABLE = "VERL_PLUGINS_CACHE"


def cache_folder() -> Path:
    """Where models and tasks are kept: $VERL_PLUGINS_CACHE, or the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or home / "verl_plugins")


def prepare(config: DictConfig) -> None:
    """Make, or find, model and data of `config.cpu` and enter their paths where the user has not named others."""
    from omegaconf import OmegaConf

    section = OmegaConf.to_container(config.get("cpu", {}), resolve=True)
    made = prepare_files(
        cache_folder(),
        typed(ModelSettings, section.get("model"), "cpu.model"),
        typed(TaskSettings, section.get("task"), "cpu.task"),
        typed(WarmupSettings, section.get("warmup"), "cpu.warmup"),
    )
    chosen = {
        "actor_rollout_ref.model.path": made.model_path,
        "data.train_files": made.train_file,
        "data.val_files": made.val_file,
    }
    for key, path in chosen.items():
        if OmegaConf.is_missing(*_parent(config, key)):
            OmegaConf.update(config, key, str(path))


def _parent(config: DictConfig, key: str) -> tuple[DictConfig, str]:
    from omegaconf import OmegaConf

    parent, _, leaf = key.rpartition(".")
    return OmegaConf.select(config, parent), leaf
